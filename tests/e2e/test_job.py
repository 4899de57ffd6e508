"""One job's way through the whole service, as a client sees it: upload, job, events, download."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compression.signing import new_key, read_public_key
from compression.verify import verify_bundle
from tests.builders import tiny_bert, tiny_dataset
from tests.e2e.service import Service, events_until_the_end, serving
from tools.rest import ApiError, Client

KEY = "signing.pem"
SPEC: dict[str, Any] = {
    "task": {"text": "text", "label": "label", "max_seq_len": 32},
    "teacher": {"epochs": 50, "max_steps": 150, "learning_rate": 0.003},
    "importance": {"rows": 64},
    "supernet": {"width_mults": ["1", "1/2"]},
    "distillation": {"epochs": 50, "max_steps": 100, "learning_rate": 0.003},
    "latency": {"rounds": 5},
    "constraints": {"max_accuracy_drop": 100},
    "report": {"slices": ["label"]},
    "seed": 1,
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("e2e")
    new_key(folder / KEY)
    with serving(folder / "data", WIDTHWISE_SIGNING_KEY=str(folder / KEY)) as running:
        yield running


@pytest.fixture(scope="module")
def client(service: Service) -> Client:
    return service.client


@pytest.fixture(scope="module")
def uploads(client: Client, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Ids of a headless tiny BERT (tar.gz, in a folder) and a dataset whose words tell (zip)."""
    folder = tmp_path_factory.mktemp("uploads")
    model = tiny_bert(folder / "model", num_labels=None)
    with tarfile.open(folder / "model.tar.gz", "w:gz") as tar:
        tar.add(model, arcname="tiny-bert")
    dataset = tiny_dataset(
        folder / "dataset", rows={"train": 400, "dev": 80, "test": 80}, labels=("bad", "good")
    )
    with zipfile.ZipFile(folder / "dataset.zip", "w") as archive:
        for file in sorted(dataset.iterdir()):
            archive.write(file, file.name)
    return {
        "model": client.upload("/v1/models", folder / "model.tar.gz", name="tiny")["id"],
        "dataset": client.upload("/v1/datasets", folder / "dataset.zip", name="words")["id"],
    }


@pytest.fixture(scope="module")
def finished(client: Client, uploads: dict[str, str]) -> dict[str, Any]:
    """The job, followed to its end, with its events and artifacts."""
    job = client.post("/v1/jobs", {**uploads, "spec": SPEC})
    events = events_until_the_end(client, job["id"])
    job = client.get(f"/v1/jobs/{job['id']}")
    assert job["state"] == "succeeded", job["error"]
    artifacts = client.get(f"/v1/jobs/{job['id']}/artifacts")["items"]
    return {"job": job, "events": events, "artifacts": {a["path"]: a for a in artifacts}}


def test_uploads_are_inspected_at_once(client: Client, uploads: dict[str, str]) -> None:
    info = client.get(f"/v1/models/{uploads['model']}")["info"]
    assert (info["family"], info["layers"], info["heads"]) == ("bert", 2, 4)
    assert info["num_labels"] is None
    assert info["legal_widths"] == ["1", "3/4", "1/2", "1/4"]
    profile = client.get(f"/v1/datasets/{uploads['dataset']}")["profile"]
    assert "400" in json.dumps(profile)


def test_a_dry_run_plans_and_stores_nothing(client: Client, uploads: dict[str, str]) -> None:
    before = len(client.get("/v1/jobs", limit=100)["items"])
    plan = client.post("/v1/jobs?dry_run=true", {**uploads, "spec": SPEC})["plan"]
    assert [s["width_mult"] for s in plan["subnetworks"]] == ["1", "1/2"]
    assert plan["labels"] == ["bad", "good"]
    assert plan["fine_tune"]
    small, large = plan["subnetworks"][1], plan["subnetworks"][0]
    assert small["parameters"] < large["parameters"]
    assert len(client.get("/v1/jobs", limit=100)["items"]) == before


def test_events_tell_every_stage_once_and_in_order(finished: dict[str, Any]) -> None:
    events = finished["events"]
    assert [event["number"] for event in events] == list(range(1, len(events) + 1))
    assert [events[0]["kind"], events[1]["kind"], events[-1]["kind"]] == [
        "queued",
        "started",
        "succeeded",
    ]
    stages = [event["data"]["stage"] for event in events if event["kind"] == "progress"]
    assert list(dict.fromkeys(stages)) == [
        stage for index, stage in enumerate(stages) if index == 0 or stages[index - 1] != stage
    ], "a stage came back after another had begun"
    for stage in ("teacher", "importance", "reorder", "distil", "evaluate", "export", "select"):
        assert stage in stages


def test_the_report_is_of_a_real_compression(finished: dict[str, Any]) -> None:
    report = finished["job"]["report"]
    full, half = report["subnetworks"]
    assert (full["width_mult"], half["width_mult"]) == ("1", "1/2")
    assert (half["heads"], half["ffn"]) == ([2, 2], [32, 32])
    assert half["parameters"] < full["parameters"]
    assert report["reorder_max_abs"] < 1e-4
    assert report["teacher"]["fine_tuned_steps"] == 150
    assert report["distillation_steps"] == 100
    # The words tell the label: training on them has to beat a coin.
    assert report["teacher"]["accuracy"] > 0.8
    assert full["accuracy"] > 0.8
    for network in report["subnetworks"]:
        assert {built["format"] for built in network["formats"]} == {
            "safetensors",
            "paddle",
            "onnx",
        }
        for built in network["formats"]:
            assert built["published"], built["error"]
            assert built["parity_max_abs"] <= 1e-4
            assert built["parity_rows"] == 64
    selection = report["selection"]
    assert selection["subnetwork"] in {"w1", "w1_2"}
    assert selection["reason"]


def test_a_finished_job_answers_its_own_and_other_constraints(
    client: Client, finished: dict[str, Any]
) -> None:
    path = f"/v1/jobs/{finished['job']['id']}/selection"
    own = client.post(path, {"constraints": finished["job"]["spec"]["constraints"]})
    assert own["selection"] == finished["job"]["report"]["selection"]
    assert {artifact["id"] for artifact in own["artifacts"]} <= {
        artifact["id"] for artifact in finished["artifacts"].values()
    }
    smallest = client.post(path, {"constraints": {"objective": "size"}})
    assert smallest["selection"]["subnetwork"] == "w1_2"
    assert "w1_2/bundle.tar.gz" in {artifact["path"] for artifact in smallest["artifacts"]}
    none = client.post(path, {"constraints": {"min_speedup": 1000, "confidence": 0.95}})
    assert none["selection"]["subnetwork"] is None
    assert len(none["selection"]["nearest"]) == 3
    (effect,) = none["selection"]["explanation"]["effects"]
    assert effect["cut"] == none["selection"]["explanation"]["candidates"] == 4


def test_every_published_file_is_downloadable_and_is_what_the_report_says(
    client: Client, finished: dict[str, Any], tmp_path: Path
) -> None:
    for network in finished["job"]["report"]["subnetworks"]:
        for built in network["formats"]:
            for file in built["files"]:
                artifact = finished["artifacts"][f"{network['name']}/{file['path']}"]
                # The client holds the bytes against ETag and Repr-Digest.
                download = client.download(artifact["content_url"], tmp_path / "file")
                assert download.sha256 == file["sha256"] == artifact["sha256"]
                assert download.size_bytes == file["size_bytes"] == artifact["size_bytes"]


def test_a_part_of_a_file_can_be_fetched(
    service: Service, client: Client, finished: dict[str, Any], tmp_path: Path
) -> None:
    artifact = finished["artifacts"]["w1_2/bundle.tar.gz"]
    whole = client.download(artifact["content_url"], tmp_path / "whole").path.read_bytes()
    host, port = service.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    key = (service.data_dir / "api_key").read_text().strip()
    headers = {"Authorization": f"Bearer {key}", "Range": "bytes=100-299"}
    connection.request("GET", artifact["content_url"], headers=headers)
    response = connection.getresponse()
    assert response.status == 206
    assert response.headers["Content-Range"] == f"bytes 100-299/{len(whole)}"
    assert response.read() == whole[100:300]
    connection.close()


def test_a_regression_report_tells_what_flipped(finished: dict[str, Any]) -> None:
    for network in finished["job"]["report"]["subnetworks"]:
        regression = network["regression"]
        assert regression["overall"]["units"] == 80
        groups = regression["by_column"]["label"]
        assert {group["name"]: group["units"] for group in groups} == {"bad": 40, "good": 40}
        assert (network["test_regression"] is not None) == network["selected"]


def test_the_bundle_is_signed_and_classifies_without_paddle(
    service: Service, client: Client, finished: dict[str, Any], tmp_path: Path
) -> None:
    artifact = finished["artifacts"]["w1_2/bundle.tar.gz"]
    archive = client.download(artifact["content_url"], tmp_path / "bundle.tar.gz").path
    public = read_public_key((service.data_dir.parent / f"{KEY}.pub").read_bytes())
    assert verify_bundle(archive, public).faults == ()
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "bundle", filter="data")
    (program,) = (tmp_path / "bundle").rglob("predict.py")
    # An import hook that refuses paddle stands for an environment without it.
    refuse = (
        "import runpy, sys\n"
        "class NoPaddle:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0].startswith('paddle'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, NoPaddle())\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    texts = ["the film is lovely and great", "a dull clumsy story"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", refuse, str(program), "--check", "--json", *texts],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["text"] for answer in answers] == texts
    assert [answer["label"] for answer in answers] == ["good", "bad"]


def test_an_upload_that_cannot_be_used_is_refused_at_once(client: Client, tmp_path: Path) -> None:
    before = len(client.get("/v1/datasets", limit=100)["items"])
    (tmp_path / "train.csv").write_text('text,label\n"fine",1\n"a ""broken" row",0,9\n')
    with pytest.raises(ApiError) as caught:
        client.upload("/v1/datasets", tmp_path / "train.csv", name="broken")
    assert caught.value.status == 422
    assert caught.value.problem["rows"][0]["line"] == 3
    assert len(client.get("/v1/datasets", limit=100)["items"]) == before


def test_a_width_without_whole_heads_is_refused_before_queueing(
    client: Client, uploads: dict[str, str]
) -> None:
    before = len(client.get("/v1/jobs", limit=100)["items"])
    spec = {**SPEC, "supernet": {"width_mults": ["1", "1/3"]}}
    with pytest.raises(ApiError) as caught:
        client.post("/v1/jobs", {**uploads, "spec": spec})
    assert caught.value.status == 422
    assert caught.value.problem["pointer"] == "/spec/supernet/width_mults/1"
    assert len(client.get("/v1/jobs", limit=100)["items"]) == before


def test_constraints_that_nothing_meets_end_without_a_selection(
    client: Client, uploads: dict[str, str]
) -> None:
    spec = {
        **SPEC,
        "teacher": {"max_steps": 1},
        "distillation": {"max_steps": 1},
        "export": {"formats": ["onnx"]},
        "constraints": {"max_latency_ms": 1e-6},
    }
    job = client.post("/v1/jobs", {**uploads, "spec": spec})
    events_until_the_end(client, job["id"])
    job = client.get(f"/v1/jobs/{job['id']}")
    assert job["state"] == "succeeded", job["error"]
    selection = job["report"]["selection"]
    assert selection["subnetwork"] is None
    assert {near["subnetwork"] for near in selection["nearest"]} == {"w1", "w1_2"}
    assert not any(network["selected"] for network in job["report"]["subnetworks"])
