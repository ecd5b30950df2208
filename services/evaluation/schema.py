"""The tables of evaluation's database."""

from services.runtime import work

SCHEMA = work.schema("comparison")
