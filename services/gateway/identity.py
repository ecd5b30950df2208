"""Who calls: whose data they may see, who they are, and what they may do."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from services.runtime.gate import Caller

Role = Literal["reader", "writer", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)  # each may do what those before it may

# Names travel in headers and stand in log lines and file names.
TENANT_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
PRINCIPAL_PATTERN = r"[!-~]{1,200}"


@dataclass(frozen=True)
class Identity:
    """A caller and their role. Raises ValueError for names that are none."""

    caller: Caller
    role: Role

    def __post_init__(self) -> None:
        if not re.fullmatch(TENANT_PATTERN, self.caller.tenant):
            raise ValueError("this is no name of a tenant")
        if not re.fullmatch(PRINCIPAL_PATTERN, self.caller.principal):
            raise ValueError("this is no name of a principal")
        if self.role not in ROLES:
            raise ValueError(f"a role is one of {', '.join(ROLES)}")

    def may(self, role: Role) -> bool:
        """Say whether this role includes `role`."""
        return ROLES.index(self.role) >= ROLES.index(role)
