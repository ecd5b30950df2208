#!/usr/bin/env bash
# The first steps with tworoads: start it, ingest the sample handbook, ask with and without it.
set -euo pipefail
cd "$(dirname "$0")"

run() {
  printf '\n$'
  for word; do
    if [[ $word == *" "* ]]; then printf ' "%s"' "$word"; else printf ' %s' "$word"; fi
  done
  printf '\n'
  "$@"
}

question="How many days of paid leave do full-time employees get?"

tworoads status >/dev/null 2>&1 || run tworoads up --detach
run tworoads ingest handbook --corpus handbook
run tworoads ask "$question" --path base --max-tokens 60
run tworoads ask "$question" --path rag --corpus handbook

cat <<'NEXT'

The stack goes on running. What to try next (with .venv/bin on the PATH):
  tworoads ask "What is the emergency number inside the building?" --corpus handbook
  tworoads search "torque sensor warranty" --corpus handbook
  tworoads tune examples/house-style.jsonl --name house --corpus handbook --epochs 1   # some minutes
  tworoads ask "What is the emergency number?" --path hybrid --adapter house --corpus handbook
  tworoads compare examples/handbook-questions.jsonl --corpus handbook --report report.html   # some minutes
  tworoads ingest YOUR_FOLDER --corpus mine
`make stop` stops it.
NEXT
