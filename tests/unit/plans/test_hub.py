"""`push` and `pull` against a hub of our own on this machine: the same plan comes back, and no token goes astray."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml
from freeze_plan_examples import example_plan

from layerprobe.errors import NotAvailableError, UnknownNameError, UsageError
from layerprobe.plans import FreezePlan

TOKEN = "hf_" + "secretsecretsecretsecretsecret1234"
COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """The few calls that the hub's client makes for one commit and one download."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    status = 200

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if type(self).status != 200:
            self.answer({"error": "no"}, type(self).status)
        elif self.path.endswith("/create"):
            self.answer({"url": f"{huggingface_hub.constants.ENDPOINT}/me/plan", "id": "me/plan"})
        elif "/preupload/" in self.path:
            paths = [entry["path"] for entry in json.loads(body)["files"]]
            self.answer(
                {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}
            )
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    type(self).files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer(
                {
                    "commitUrl": f"{huggingface_hub.constants.ENDPOINT}/me/plan/commit/{COMMIT}",
                    "commitOid": COMMIT,
                }
            )
        else:
            self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if "me/plan" not in self.path:
            self.answer({}, 404, X_Error_Code="RepoNotFound")
        elif name not in self.files:
            self.answer({}, 404, X_Error_Code="EntryNotFound")
        else:
            digest = hashlib.sha1(self.files[name]).hexdigest()
            self.answer(self.files[name], ETag=f'"{digest}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.files, Hub.status = {}, 200
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    pattern = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", pattern)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield Hub
    server.shutdown()
    server.server_close()


def found_plan() -> FreezePlan:
    plan = example_plan("gpt2", [1, 2], model_id="openai-community/gpt2")
    accuracy = {
        "mean": 0.725,
        "low": 0.632,
        "high": 0.818,
        "interval": "95 % t over unseen seeds",
        "n_seeds": 3,
    }
    return plan.with_found(
        task="digits", task_id="scikit-learn/digits", test_accuracy=accuracy, answer="Train <1>."
    )


def test_a_plan_comes_back_as_it_went(hub: type[Hub], tmp_path: Path) -> None:
    plan = found_plan()
    assert plan.push("me/plan").endswith(COMMIT)
    again = FreezePlan.pull("me/plan")
    assert again == plan and again.to_dict() == plan.to_dict()
    assert hub.files["plan.json"] == plan.save(tmp_path / "plan.json").read_bytes()


def test_the_card_holds_the_accuracy_with_its_interval(hub: type[Hub]) -> None:
    found_plan().push("me/plan")
    _, head, body = hub.files["README.md"].decode().split("---\n", 2)
    data = yaml.safe_load(head)
    result = data["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"] == 0.725 and result["metrics"][0]["args"]["low"] == 0.632
    assert data["base_model"] == "openai-community/gpt2" and "freeze-plan" in data["tags"]
    assert "72.5 % (95 % t over unseen seeds, n = 3: 63.2 % to 81.8 %)" in body and "Train &lt;1>." in body
    assert 'lp.FreezePlan.pull("me/plan")' in body


def test_a_plan_that_was_not_searched_claims_no_accuracy(hub: type[Hub]) -> None:
    example_plan("gpt2", [1]).push("me/plan")
    card = hub.files["README.md"].decode()
    assert "model-index" not in card and "accuracy" not in card.lower()


@pytest.mark.parametrize("status", [200, 401, 403, 500])
def test_a_token_is_never_printed_logged_or_stored(
    hub: type[Hub], tmp_path: Path, status: int, run_cli: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.status = status
    found_plan().save(tmp_path / "plan.json")
    pushed = run_cli("plan", "push", tmp_path / "plan.json", "me/plan")
    pulled = run_cli("plan", "pull", "me/plan", "-o", tmp_path / "pulled" / "plan.json", "--json")
    assert pushed.code == (0 if status == 200 else 1)
    if status != 200:
        hint = "; log in with `hf auth login`, with the right to write" if status < 500 else ""
        assert pushed.err == f"error: cannot write to 'me/plan': the hub answers {status}{hint}\n"
    else:
        assert pulled.code == 0 and FreezePlan.load(tmp_path / "pulled") == found_plan()
    own = [r.getMessage() for r in caplog.records]
    for text in (
        pushed.out,
        pushed.err,
        pulled.out,
        pulled.err,
        *own,
        *(f.decode() for f in hub.files.values()),
    ):
        assert TOKEN not in text
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_what_is_not_there_is_one_line(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="the hub has no 'other/plan'"):
        FreezePlan.pull("other/plan")
    with pytest.raises(UnknownNameError, match=r"'me/plan' holds no plan\.json"):
        FreezePlan.pull("me/plan")
    with pytest.raises(UsageError, match="'plan' is no repository of the hub: it is written OWNER/NAME"):
        FreezePlan.pull("plan")
    with pytest.raises(NotAvailableError, match="'me/plan' is not cached"):
        FreezePlan.pull("me/plan", offline=True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NotAvailableError, match="cannot write to 'me/plan': the hub cannot be reached"):
        found_plan().push("me/plan")
