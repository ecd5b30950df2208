"""The tables of tuning's database."""

from services.runtime import work

SCHEMA = (
    work.schema("job")
    + """
CREATE TABLE adapters (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    name TEXT NOT NULL,
    deleted REAL NOT NULL DEFAULT 0,
    adapter TEXT NOT NULL,
    UNIQUE (tenant, id)
);
"""
)
