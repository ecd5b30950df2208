"""The tables of tuning's database."""

SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    state TEXT NOT NULL,
    idempotency_key TEXT NOT NULL,
    upload_hash TEXT NOT NULL,
    job TEXT NOT NULL
);
CREATE UNIQUE INDEX keys ON jobs (tenant, idempotency_key) WHERE idempotency_key != '';
CREATE TABLE events (
    job TEXT NOT NULL REFERENCES jobs (id),
    sequence INTEGER NOT NULL,
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (job, sequence)
) WITHOUT ROWID;
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
