"""Which adapter a name stands for, as the tuning service says, or said last if it is away."""

from collections import OrderedDict
from dataclasses import dataclass, replace

from tworoads.v1 import tuning_pb2 as pb
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from services.prompts.words import DEFAULT_VERSION, VERSIONS
from services.runtime.call import outgoing, tenant
from services.runtime.errors import NotFound, NotReady, Overloaded, TooLate, Unavailable, downstream

SECONDS = 3.0
MOST_KNOWN = 1000  # names and ids of all tenants together; some hundred bytes each
SERVED = (pb.ADAPTER_STATE_READY, pb.ADAPTER_STATE_UNMEASURED)


@dataclass(frozen=True)
class Adapter:
    """What the gateway needs to know of an adapter.

    `id` is NAME@HASH. `served` is what tuning thinks of its state: only generation refuses it.
    `newest` is False if it was asked for by NAME and tuning was not there to say.
    """

    id: str
    name: str
    prompt_version: str
    context: pb.TrainingContext.ValueType
    served: bool
    newest: bool = True


class Adapters:
    """Looks adapters up, and remembers what it found for when tuning is away."""

    def __init__(self, tuning: TuningServiceStub) -> None:
        self._tuning = tuning
        # By tenant and NAME or NAME@HASH, the one used last at the end.
        self._known: OrderedDict[tuple[str, str], Adapter] = OrderedDict()

    async def resolve(self, asked: str) -> Adapter:
        """Return what NAME or NAME@HASH stands for now; while tuning is away, what it did last.

        Raises NotFound (ADAPTER_NOT_FOUND), InvalidInput (ADAPTER_NAME_INVALID), NotReady
        (PROMPT_VERSION_UNKNOWN), and Unavailable (TUNING_UNAVAILABLE) for one that was never seen.
        """
        arguments = outgoing(SECONDS)
        try:
            with downstream("tuning"):
                response = await self._tuning.GetAdapter(
                    pb.GetAdapterRequest(adapter=asked), **arguments
                )
        except NotFound:
            self.forget(asked)
            raise
        except (Unavailable, Overloaded, TooLate) as error:
            known = self._known.get((tenant(), asked))
            if known is None:
                message = "the tuning service, which knows the adapter, is away; try again"
                raise Unavailable("TUNING_UNAVAILABLE", message) from error
            self._known.move_to_end((tenant(), asked))
            return replace(known, newest=asked == known.id)
        adapter = _adapter(response.adapter)
        if adapter.prompt_version not in VERSIONS:
            raise NotReady(
                "PROMPT_VERSION_UNKNOWN",
                "the adapter was trained with a prompt version that this server does not know",
            )
        for name in (adapter.id, asked):
            self._known[tenant(), name] = adapter
            self._known.move_to_end((tenant(), name))
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        return adapter

    def forget(self, asked: str) -> None:
        """Forget an adapter of the caller under all its names, or all versions of a name."""
        for (owner, name), known in list(self._known.items()):
            if owner == tenant() and asked in (known.id, known.name):
                del self._known[owner, name]


def _adapter(found: pb.Adapter) -> Adapter:
    return Adapter(
        found.id,
        found.name,
        found.prompt_version or DEFAULT_VERSION,
        found.options.context,
        found.state in SERVED or bool(found.accepted_by),
    )
