"""Run every benchmark and write docs/performance.md from what they measured.

Run: python benchmarks/run_all.py [--data ../shared/data] [--render-only]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "performance.md"
COMMANDS = {
    "alignment": ["alignment.py", "--data", "{data}"],
    "search": ["search.py", "--documents", "100000", "1000000"],
    "splade_head": ["splade_head.py", "--data", "{data}"],
    "terms_loss": ["terms_loss.py"],
    "training_throughput": ["training_throughput.py", "--data", "{data}"],
    "encode": ["encode.py", "--data", "{data}"],
    "tokenizer_expansion": ["tokenizer_expansion.py", "--data", "{data}"],
    "partitioned_embedding": ["partitioned_embedding.py"],
    "expansion": ["expansion.py"],
}
INTRODUCTION = """# Performance

Written by `make bench` from `benchmarks/results/*.json`. Each claim is a script that measures soju and the peer in the
same run; the ratio is what counts, machines are noisy. `holds` says whether the goal was met, also when it was not.
"""


def main() -> None:
    """Run and render."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--render-only", action="store_true", help="render what is in benchmarks/results")
    arguments = parser.parse_args()
    if not arguments.render_only:
        for command in COMMANDS.values():
            script, *options = [part.format(data=arguments.data) for part in command]
            subprocess.run([sys.executable, str(HERE / script), *options], check=True)
    sections = [INTRODUCTION]
    for name in COMMANDS:
        path = RESULTS / f"{name}.json"
        if path.exists():
            sections.append(render(name, json.loads(path.read_text(encoding="utf-8"))))
    PAGE.write_text("\n".join(sections), encoding="utf-8")
    print(PAGE)


def render(name: str, result: dict[str, Any]) -> str:
    """Return the section of one benchmark."""
    machine = result["machine"]
    versions = machine.get("versions", {key: value for key, value in machine.items() if key not in ("cpu", "cores")})
    lines = [
        f"## {name}",
        "",
        f"`python benchmarks/{' '.join(COMMANDS[name]).format(data='../shared/data')}` on {machine['cpu']}, "
        f"{machine['cores']} cores; {', '.join(f'{key} {value}' for key, value in versions.items())}.",
        "",
        "| claim | metric | ours | peer | ratio | goal | holds |",
        "| --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for claim in result["claims"]:
        ours, peer, ratio = (f"{claim[key]:,.4g}" for key in ("ours", "peer", "ratio"))
        lines.append(
            f"| {claim['benchmark']} | {claim['metric']} | {ours} | {peer} | {ratio} | {claim['goal']} "
            f"| {'yes' if claim['holds'] else '**no**'} |"
        )
    if "scaling" in result:
        shutil.copy(RESULTS / f"{name}_scaling.png", PAGE.parent / f"{name}_scaling.png")
        lines += ["", f"![Time against token pairs]({name}_scaling.png)", ""]
        lines += [
            "| sentence pairs | token pairs | processor seconds a round | ns a token pair |",
            "| ---: | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {row['pairs']:,} | {row['token_pairs']:,} | {row['processor_seconds']:.2f} "
            f"| {row['processor_nanoseconds_per_token_pair']:.1f} |"
            for row in result["scaling"]
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
