"""What people see: the front in MLflow's UI, and the page of the front without a network.

AUTOPEFT_SCREENSHOTS names a folder to keep the pictures in.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests
from mlflow import MlflowClient

from autopeft.studies.tracking.mlflow_payload import run_name
from autopeft.studies.tracking.mlflow_sync import Tracker

from ..support.tracked_study import FRONT, TRIALS, free_port, mlflow_server, snapshot, wait_for

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None or CHROMEDRIVER is None, reason="chromium and chromedriver are not both installed"
    ),
]

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,1000",
    # A proxy that is not there, which loopback addresses do not pass: whatever a page asks the network for fails.
    "--proxy-server=127.0.0.1:9",
)
TRIAL_LINKS = "return [...document.querySelectorAll('a')].map(a => a.innerText).filter(t => t.startsWith('trial '))"


class Browser:
    """A session of Chromium, by the W3C's WebDriver protocol."""

    def __init__(self, session: str, pictures: Path) -> None:
        self.session = session
        self.pictures = pictures

    def ask(self, method: str, path: str, data: dict[str, Any] | None = None) -> Any:
        answer = requests.request(method, f"{self.session}/{path}", json=data, timeout=120).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def open(self, url: str) -> None:
        # From one place of a single-page application to another, only a blank page in between loads anew.
        self.ask("POST", "url", {"url": "about:blank"})
        self.ask("POST", "url", {"url": url})

    def run(self, script: str) -> Any:
        return self.ask("POST", "execute/sync", {"script": script, "args": []})

    def wait(self, script: str, good: Callable[[Any], bool]) -> Any:
        """What `script` returns once it is good; what it returned last if that takes too long."""
        until = time.monotonic() + 60
        while not good(answer := self.run(script)) and time.monotonic() < until:
            time.sleep(0.3)
        return answer

    def picture(self, name: str) -> None:
        (self.pictures / f"{name}.png").write_bytes(base64.b64decode(self.ask("GET", "screenshot")))


@contextmanager
def chromium(folder: Path, pictures: Path) -> Iterator[Browser]:
    assert CHROMEDRIVER is not None
    port = free_port()
    with subprocess.Popen([CHROMEDRIVER, f"--port={port}"], stdout=subprocess.DEVNULL) as driver:
        try:
            root = f"http://127.0.0.1:{port}"
            wait_for(f"{root}/status")
            options = {"binary": CHROMIUM, "args": [*ARGUMENTS, f"--user-data-dir={folder}"]}
            wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
            answer = requests.post(f"{root}/session", json=wanted, timeout=120).json()["value"]
            assert "sessionId" in answer, answer
            session = f"{root}/session/{answer['sessionId']}"
            yield Browser(session, pictures)
            requests.delete(session, timeout=60)
        finally:
            driver.terminate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    pictures = Path(os.environ.get("AUTOPEFT_SCREENSHOTS") or tmp_path_factory.mktemp("pictures"))
    pictures.mkdir(parents=True, exist_ok=True)
    with chromium(tmp_path_factory.mktemp("profile"), pictures) as session:
        yield session


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    folder = tmp_path_factory.mktemp("study")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    assert Tracker(uri, "topics-project", folder).sync(snapshot(), final=True)
    return MlflowClient(uri)


@pytest.fixture(scope="module")
def runs(store: MlflowClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where MLflow shows the runs of the experiment."""
    experiment = store.get_experiment_by_name("topics-project")
    assert experiment is not None
    with mlflow_server(store.tracking_uri, tmp_path_factory.mktemp("served")) as uri:
        yield f"{uri}/#/experiments/{experiment.experiment_id}/runs"


def names(numbers: tuple[int, ...]) -> list[str]:
    return sorted(run_name(TRIALS[number], snapshot()) for number in numbers)


def test_the_filter_shows_exactly_the_front(browser: Browser, runs: str) -> None:
    front_filter = quote("tags.`autopeft.pareto` = 'true'")
    order = quote("metrics.`obj/accuracy`")
    browser.open(f"{runs}?searchFilter={front_filter}&orderByKey={order}&workflowType=machine_learning")
    found = browser.wait(TRIAL_LINKS, lambda found: len(found) >= len(FRONT))
    assert sorted(found) == names(FRONT)
    assert "3 matching runs" in browser.run("return document.body.innerText")
    browser.picture("mlflow-filter")


def test_without_the_filter_everything_is_there(browser: Browser, runs: str) -> None:
    order = quote("metrics.`obj/accuracy`")
    browser.open(f"{runs}?orderByKey={order}&workflowType=machine_learning")
    found = browser.wait(TRIAL_LINKS, lambda found: len(found) >= len(TRIALS))
    assert sorted(found) == names(tuple(range(len(TRIALS))))
    browser.picture("mlflow-all")


def test_the_note_leads_to_the_front_and_its_numbers(browser: Browser, runs: str, store: MlflowClient) -> None:
    (parent,) = store.search_runs([runs.split("/")[-2]], "tags.`autopeft.role` = 'study'")
    browser.open(f"{runs}/{parent.info.run_id}?workflowType=machine_learning")
    link = "return document.querySelector('a[href*=viewStateShareKey]')?.href"
    target = browser.wait(link, bool)
    browser.picture("mlflow-study")
    browser.open(target)
    found = browser.wait(TRIAL_LINKS, lambda found: len(found) >= len(FRONT))
    assert sorted(found) == names(FRONT)
    text = browser.wait("return document.body.innerText", lambda text: "front/accuracy_std_err" in text)
    for column in ("front/accuracy", "front/accuracy_std_err", "front/num_params", "autopeft.recommended", "2176"):
        assert column in text
    browser.picture("mlflow-front")


def test_the_page_of_the_front_draws_without_a_network(browser: Browser, store: MlflowClient, tmp_path: Path) -> None:
    experiment = store.get_experiment_by_name("topics-project")
    assert experiment is not None
    (parent,) = store.search_runs([experiment.experiment_id], "tags.`autopeft.role` = 'study'")
    page = store.download_artifacts(parent.info.run_id, "pareto/front.html", str(tmp_path))
    browser.open(Path(page).as_uri())
    points = "return document.querySelectorAll('.plotly .scatterlayer path.point').length"
    # The candidates that are complete, and the baseline.
    assert browser.wait(points, lambda count: count == 5) == 5
    labels = browser.run("return [...document.querySelectorAll('.plotly .textpoint')].map(t => t.textContent.trim())")
    assert {"trial 1", "trial 2", "trial 4", "lora-r2"} <= set(labels)
    browser.picture("front")


DEMO = Path(__file__).parents[2] / "runs" / "demo" / "mlflow.db"


@pytest.mark.skipif(not DEMO.is_file(), reason="there is no demo's database: `make demo` makes it")
def test_the_demo(browser: Browser, tmp_path: Path) -> None:
    """The same on what `make demo` has left: the filter lists the front's runs, and its page draws."""
    store = MlflowClient(f"sqlite:///{DEMO}")
    experiment = store.get_experiment_by_name("demo")
    assert experiment is not None
    front = store.search_runs([experiment.experiment_id], "tags.`autopeft.pareto` = 'true'")
    (parent,) = store.search_runs([experiment.experiment_id], "tags.`autopeft.role` = 'study'")
    with mlflow_server(store.tracking_uri, tmp_path) as uri:
        browser.open(f"{uri}/#/experiments/{experiment.experiment_id}/runs/{parent.info.run_id}")
        browser.open(browser.wait("return document.querySelector('a[href*=viewStateShareKey]')?.href", bool))
        found = browser.wait(TRIAL_LINKS, lambda found: len(found) >= len(front))
        assert sorted(found) == sorted(run.info.run_name for run in front)
        browser.wait("return document.body.innerText", lambda text: "front/accuracy_std_err" in text)
        browser.picture("demo-mlflow")
    browser.open(Path(store.download_artifacts(parent.info.run_id, "pareto/front.html", str(tmp_path))).as_uri())
    points = "return document.querySelectorAll('.plotly .scatterlayer path.point').length"
    assert browser.wait(points, lambda count: count >= len(front)) >= len(front)
    browser.picture("demo-front")
