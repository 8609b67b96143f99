"""The command cka: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from layerprobe.cli.main import Program


@pytest.fixture(scope="module")
def program() -> typer.Typer:
    from layerprobe.cli import cka, env

    app = typer.Typer(cls=Program, pretty_exceptions_enable=False)
    app.command("cka")(cka.cka)
    app.command("env")(env.env)
    return app


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    import torch
    import transformers

    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=40, bos_token_id=0, eos_token_id=0
    )
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with torch.random.fork_rng():
        transformers.GPT2Model(config).save_pretrained(folder)
    return str(folder)


def arguments(model: str, *more: str) -> list[str]:
    return [
        "cka", "--model", model, "--task", "digits", "--limit", "120", "--patch-size", "4", "--device", "cpu",
        "--offline", "--permutations", "50", "-q", *more,
    ]  # fmt: skip


def test_two_models_give_tables_figures_and_a_summary(program, model, tmp_path) -> None:
    folder = tmp_path / "out"
    done = CliRunner().invoke(
        program, arguments(model, "--init-b", "random", "--intervals", "-o", str(folder))
    )
    assert done.exit_code == 0, done.stderr
    assert "layers of" in done.stdout and "more than chance" in done.stdout
    assert {path.name for path in folder.iterdir()} == {
        "cka.csv", "cka.json", "cka.png", "cka_closest.csv", "cka_closest.png", "settings.yaml",
    }  # fmt: skip
    frame = pd.read_csv(folder / "cka.csv")
    assert len(frame) == 9 and set(frame["model_y"]) == {f"{frame['model'].iloc[0]} (random init)"}
    assert frame["n"].nunique() == 1 and frame["value"].between(-1, 1).all()


def test_json_is_strict_and_alone_on_stdout(program, model) -> None:
    done = CliRunner().invoke(program, arguments(model, "--json", "--blocks", "0"))
    assert done.exit_code == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["schema"] == "layerprobe.cka/v1"
    assert [(row["site"], row["site_y"]) for row in body["rows"]] == [
        ("embed", "embed"), ("embed", "resid_post"), ("resid_post", "embed"), ("resid_post", "resid_post"),
    ]  # fmt: skip
    assert body["rows"][0]["value"] == pytest.approx(1.0)
    assert body["provenance"]["features_x"]["backbone"]


def test_a_dry_run_computes_nothing(program, model) -> None:
    done = CliRunner().invoke(program, arguments(model, "--dry-run", "--json", "--init-b", "random"))
    assert done.exit_code == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["dry_run"] is True and "random" in body["compared with"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--split", "tst"), "unknown split 'tst'. Did you mean 'test'?"),
        (("--blocks", "7"), "block 7 does not exist"),
        (("--sites", "mlp"), "unknown site 'mlp'"),
        (("--model-b", "no-such-model"), "no-such-model"),
    ],
)
def test_mistakes_are_one_line(program, model, more, message) -> None:
    done = CliRunner().invoke(program, arguments(model, *more))
    assert done.exit_code in (1, 2)
    assert message in done.stderr and "Traceback" not in done.stderr
