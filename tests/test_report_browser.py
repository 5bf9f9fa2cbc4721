"""The report in a real browser: it opens offline, asks nothing of the network, decodes every image and fits a phone."""

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
from evaluation_example import MARKERS, example_folder
from PIL import Image

from lingshu_cell.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("LINGSHU_CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)
# The browser's own services, which no flag silences entirely; everything else would be the page's doing.
BROWSER_SERVICES = ("google.com", "googleapis.com", "gvt1.com", "gstatic.com")
OWNED = "document.documentElement.setAttribute('data-owned','1')"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="needs Chromium: install it (Debian: apt-get install chromium) or set LINGSHU_CHROMIUM to its path",
    ),
]


@dataclass(frozen=True)
class Visit:
    """What the browser made of a page."""

    dom: str
    console: list[str]
    hosts: set[str]


def run(page: Path, scratch: Path, *options: str) -> subprocess.CompletedProcess:
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={scratch / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def visit(page: Path, scratch: Path) -> Visit:
    log = scratch / "net.json"
    done = run(page, scratch, "--dump-dom", "--enable-logging=stderr", f"--log-net-log={log}")
    addresses = re.findall(r'"url":"(\w+://[^"]*)"', log.read_text(errors="replace"))
    hosts = {urlsplit(address).hostname for address in addresses if address.startswith(("http", "ws"))}
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Visit(done.stdout, console, {h for h in hosts if not (h or "").endswith(BROWSER_SERVICES)})


def attribute(dom: str, name: str) -> str | None:
    found = re.search(rf'<html[^>]* {name}="([^"]*)"', dom)
    return found.group(1) if found else None


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write_report(
        shutil.copytree(example_folder(tmp_path_factory, shuffle=True), tmp_path_factory.mktemp("browser") / "out")
    )


@pytest.fixture(scope="module")
def visited(page, tmp_path_factory) -> Visit:
    return visit(page, tmp_path_factory.mktemp("visit"))


def test_opens_offline_without_requests_or_complaints(visited):
    n_images = 2 + 2 * len(MARKERS)
    assert attribute(visited.dom, "data-images") == f"{n_images}/{n_images}"
    assert attribute(visited.dom, "data-requests") == "0"
    assert visited.console == []
    assert visited.hosts == set()


def test_sections_are_there(visited):
    for section in ("verdict", "map", "types", "measurements", "distributions", "training", "provenance", "glossary"):
        assert f'<section id="{section}"' in visited.dom
    assert "Recognised almost always" in visited.dom


def test_complaints_would_be_noticed(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    image = '<img src="http://example.org/a.png"><img src="data:image/png;base64,AAAA"><script>1</script>'
    broken.write_text(text.replace("</main>", image + "</main>"), encoding="utf-8")
    seen = visit(broken, tmp_path)
    assert any("Content Security Policy" in line for line in seen.console)
    good, of = attribute(seen.dom, "data-images").split("/")
    assert int(of) - int(good) == 2


def test_hostile_names_do_not_run(page, tmp_path):
    folder = Path(shutil.copytree(page.parent, tmp_path / "out"))
    hostile = [f"<script>{OWNED}</script>", f'"><img src=x onerror="{OWNED}">', f'</script><svg onload="{OWNED}">']
    cells = pd.read_csv(folder / "cells.csv.gz", keep_default_na=False)
    cells.loc[: len(hostile) - 1, "cell_type"] = hostile
    cells = cells.rename(columns={"gene:LYZ": f"gene:{hostile[1]}"})
    cells.to_csv(folder / "cells.csv.gz", index=False)
    facts = json.loads((folder / "facts.json").read_text())
    facts["files"]["generated"]["name"] = hostile[0]
    (folder / "facts.json").write_text(json.dumps(facts))
    # Without the security policy, so that escaping alone is tested.
    text = write_report(folder, title=hostile[2]).read_text(encoding="utf-8")
    bare = folder / "bare.html"
    bare.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text), encoding="utf-8")
    seen = visit(bare, tmp_path)
    assert attribute(seen.dom, "data-owned") is None
    good, of = attribute(seen.dom, "data-images").split("/")
    assert good == of and seen.console == []


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_sideways(page, tmp_path, width):
    # Chromium's windows are at least 500 wide, so the page is put into a frame that is as narrow as a phone.
    frame = tmp_path / "frame.html"
    inner = html.escape(page.read_text(encoding="utf-8"), quote=True)
    frame.write_text(
        f"""<!doctype html><html><body style="margin:0"><iframe id="f" style="border:0;width:{width}px;height:900px"
        srcdoc="{inner}"></iframe><script>window.addEventListener("load", function () {{
          var root = document.getElementById("f").contentDocument.documentElement;
          document.documentElement.setAttribute("data-width", root.dataset.width);
        }});</script></body></html>""",
        encoding="utf-8",
    )
    wide, visible = map(int, attribute(run(frame, tmp_path, "--dump-dom").stdout, "data-width").split("/"))
    assert wide == visible and width - 20 <= visible <= width


@pytest.mark.parametrize("dark", [False, True])
def test_screenshot_shows_a_page_in_the_readers_colours(page, tmp_path, dark):
    picture = tmp_path / "page.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    run(page, tmp_path, f"--screenshot={picture}", "--window-size=1280,3200", *scheme)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape[:2] == (3200, 1280)
    ground = pixels[1000, 5].mean()
    assert ground < 60 if dark else ground > 230
    assert len(np.unique(pixels[::3, ::3].reshape(-1, 3), axis=0)) > 500  # text, maps and bars, not a blank sheet
    orange = (abs(pixels - np.array([240, 147, 79] if dark else [217, 114, 43])).sum(axis=2) < 12).mean()
    assert orange > 1e-3, "the bars of generated cells are missing"
