"""`tworoads compare`: questions in, a verdict out."""

import json as codec
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer
from rich.console import Console

from clients.cli.comparing import tell, watch
from clients.cli.data import finding, read_again
from clients.cli.output import Address, Json, print_json, run
from clients.cli.policies import applied
from clients.cli.verdict import next_steps
from clients.client import Client
from clients.comparisons import Candidate, Comparison, Constraints, Scoring
from clients.jobs import CheckProgress, Finding
from clients.local import LocalError

Strict = Literal["exact_match", "token_f1", "label", "json", "regex"]
FormatBlind = Literal["contains", "numeric", "token_f1"]

PATHS = ("base", "few-shot", "rag", "tuned", "hybrid")


def compare(
    questions: Annotated[
        Path, typer.Argument(help="Questions, as JSON Lines; - reads them from standard input.")
    ],
    corpus: Annotated[
        str,
        typer.Option(
            "--corpus", "-c", envvar="TWOROADS_CORPUS", help="Where RAG and HYBRID search."
        ),
    ] = "",
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="An adapter for TUNED and HYBRID; may be repeated."),
    ] = None,
    paths: Annotated[
        str,
        typer.Option(
            help=f"What to compare, of {','.join(PATHS)}; few-shot needs --examples then.",
            show_default="all that can be",
        ),
    ] = "",
    examples: Annotated[
        Path | None,
        typer.Option(help="What few-shot is shown: JSON Lines of question and answer, at most 32."),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=32,
            help="How many examples few-shot is shown; 0 leaves it out.",
            show_default="4",
        ),
    ] = None,
    changed: Annotated[
        list[Path] | None,
        typer.Option(
            help="Documents as they become, as for `ingest`; may be repeated. After the first pass"
            " they replace those of the corpus, for good, and their questions are asked again."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Where to write the report: .html, .md or .json.", show_default="nowhere"
        ),
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Let AUTO follow the verdict from then on.")
    ] = False,
    max_cost: Annotated[
        float | None, typer.Option(min=0, help="The most that a correct answer may cost.")
    ] = None,
    max_p95: Annotated[
        float | None,
        typer.Option(min=0, help="The longest p95 of the time to answer, in milliseconds."),
    ] = None,
    min_quality: Annotated[
        float | None, typer.Option(min=0, max=1, help="The lowest format-blind score.")
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            min=0, max=0.5, help="How much worse a cheaper path may be.", show_default="0.05"
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=0, max=64, help="Questions at the same time.", show_default="4")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Makes the comparison repeatable.")] = 0,
    scorer: Annotated[
        Strict | None,
        typer.Option(help="The score that heeds the form.", show_default="by the answers"),
    ] = None,
    format_blind: Annotated[
        FormatBlind | None,
        typer.Option(help="The score that does not.", show_default="by the answers"),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="The relative difference that `numeric` allows.")
    ] = 0.0,
    judge: Annotated[
        bool, typer.Option("--judge", help="Also ask the language model set up as a judge.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once the comparison is in the queue.")
    ] = False,
    address: Address = "",
    json: Json = False,
) -> None:
    """Answer questions by every path, and say which path to take.

    Each line of QUESTIONS is {"question": ..., "answers": [...]}, optionally with "relevant" (ids
    of documents), "type" and "stale_answers" (right until the documents change). Lines that are not
    in order are named. Every path answers every question; quality, latency and cost are measured,
    and the verdict says what they are worth. Ctrl-C leaves the comparison running. Exit code 1 if
    it failed; 0 if it finished, also with not enough evidence.
    """
    if detach and (report or apply):
        raise typer.BadParameter("--detach cannot wait for --report or --apply")
    shown = _examples(examples) if examples else []
    adapters = adapter or []
    candidates = _candidates(paths, adapters, shown) if paths else []
    scoring = Scoring(scorer or "", format_blind or "", tolerance, judge)
    constraints = Constraints(max_cost, max_p95, min_quality)
    arguments: dict[str, Any] = {
        "corpus": corpus,
        "adapters": [] if candidates else adapters,
        "candidates": candidates,
        "changed": changed or [],
        "examples": shown,
        "shots": shots,
        "scoring": scoring if scoring != Scoring() else None,
        "constraints": constraints if constraints != Constraints() else None,
        "concurrency": concurrency,
        "margin": margin,
        "seed": seed,
    }
    with read_again(questions) as file:
        comparison = run(address, lambda client: _create(client, file, arguments))
    if detach and json:
        print_json(comparison)
    elif detach:
        id = comparison.id
        print(f"Comparison {id} is in the queue. Watch it: tworoads comparisons watch {id}")
    else:
        _finish(address, comparison.id, report, apply, json)


def _finish(address: str, id: str, report: Path | None, apply: bool, json: bool) -> None:
    """Show a comparison to its end, then what came of it; write the report and set the policy if
    that was asked for. What was measured is told first, whatever comes of these."""
    comparison = watch(address, id)
    tell(comparison, json, [])
    steps = [] if json else next_steps(comparison)
    if report:
        run(address, lambda client: client.download_report(id, report))
        steps[:1] = [f"Its report is in {report}."]
    if apply and comparison.verdict and comparison.verdict.candidate:
        print("".join(f"{step}\n" for step in steps[:1]), end="", file=_aside(json))
        policy = run(address, lambda client: client.apply(comparison))
        print(applied(policy), file=_aside(json))
        return
    print("".join(f"{step}\n" for step in steps), end="", file=_aside(json))
    if apply:
        print("The verdict names no path, so no policy was set.", file=sys.stderr)


def _aside(json: bool) -> TextIO:
    """Return where to say what is not the result."""
    return sys.stderr if json else sys.stdout


def _candidates(
    paths: str, adapters: list[str], examples: list[tuple[str, str]]
) -> list[Candidate]:
    """Return the candidates of these paths, with the ids that the service would give them."""
    found = []
    for path in dict.fromkeys(name.strip() for name in paths.split(",")):
        if path not in PATHS:
            raise typer.BadParameter(f"--paths takes {', '.join(PATHS)}, not {path!r}")
        if path in ("tuned", "hybrid"):
            if not adapters:
                raise typer.BadParameter(f"{path} among --paths needs --adapter")
            for adapter in adapters:
                id = path if len(adapters) == 1 else f"{path}-{adapter.partition('@')[0]}"
                found.append(Candidate(id, path, adapter))
        elif path == "few-shot":
            if not examples:
                raise typer.BadParameter("few-shot among --paths needs --examples")
            turns = [{"question": asked, "answer": said} for asked, said in examples]
            found.append(Candidate(path, "base", options={"examples": turns}))
        else:
            found.append(Candidate(path, path))
    return found


def _examples(file: Path) -> list[tuple[str, str]]:
    """Return the pairs of question and answer of a file of JSON Lines."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise LocalError(f"cannot read {file}: {error.strerror}") from error
    return [
        _example(text, f"{file}, line {number}")
        for number, text in enumerate(lines, 1)
        if text.strip()
    ]


def _example(text: bytes, where: str) -> tuple[str, str]:
    try:
        match codec.loads(text):
            case {"question": str(question), "answer": str(answer)}:
                return question, answer
    except (ValueError, RecursionError):
        pass
    raise LocalError(f'{where}: not a JSON object with "question" and "answer"')


async def _create(client: Client, questions: Path, arguments: dict[str, Any]) -> Comparison:
    console = Console(stderr=True)
    with console.status("Checking") as status:
        async for news in client.create_comparison(questions, **arguments):
            match news:
                case Finding():
                    print(finding(news, "questions"), file=sys.stderr)
                case CheckProgress():
                    status.update(f"Checking: {news.checked:,} lines")
                case Comparison():
                    return news
    raise LocalError("the server ended the check without a comparison")
