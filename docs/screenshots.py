"""Take the screenshots of the demo in docs/images. It needs chromium, playwright and a font with emoji.

$ python docs/screenshots.py
"""

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright


ROOT = Path(__file__).parents[1]
PORT = 7869
DESK, TALL, PHONE = ({"width": w, "height": h} for w, h in ((1280, 800), (1280, 1240), (390, 844)))
TIMEOUT = 600_000  # ms; a slow machine takes minutes


def faces(page: Page) -> None:
    page.click("#generate")
    page.wait_for_selector("#faces .note:has-text('Made in')")


def walk(page: Page) -> None:
    page.get_by_role("tab", name="Walk").click()
    page.click("#walk-run")
    page.wait_for_selector("#walk .note:has-text('Made in')")


def restore(page: Page) -> None:
    page.get_by_role("tab", name="Restore").click()
    page.locator("#restore-face canvas").nth(1).wait_for(state="attached")  # the editor is loaded
    page.click("#restore-generated")
    page.wait_for_timeout(5000)
    box = page.locator("#restore-face canvas").first.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y - 25)
    page.mouse.down()
    for dx, dy in ((60, -25), (60, 0), (-60, 0)):
        page.mouse.move(x + dx, y + dy, steps=10)
    page.mouse.up()
    page.click("#restore-run")
    page.wait_for_selector("#restored .note:has-text('Made in')")


def main() -> None:
    command = [sys.executable, "-u", "-c", "from ddpm_faces.cli import main; main()"]
    command += ["demo", str(ROOT / "models" / "faces64"), "--port", str(PORT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo, sync_playwright() as driver:
        try:
            print(demo.stdout.readline(), end="")
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for name, show, viewport, scheme in (
                ("demo-faces", faces, DESK, "light"),
                ("demo-dark", walk, DESK, "dark"),
                ("demo-phone", faces, PHONE, "light"),
                ("demo-restore", restore, TALL, "light"),
            ):
                page = browser.new_page(viewport=viewport, color_scheme=scheme)
                page.set_default_timeout(TIMEOUT)
                page.goto(f"http://127.0.0.1:{PORT}/")
                show(page)
                page.mouse.move(0, 0)
                path = ROOT / "docs" / "images" / f"{name}.png"
                page.screenshot(path=path, animations="disabled")
                print(path, path.stat().st_size)
                page.close()
        finally:
            demo.terminate()


if __name__ == "__main__":
    main()
