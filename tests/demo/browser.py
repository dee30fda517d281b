"""A headless Chromium (Qt's) that does what it is told on its standard input, as a program.

One JSON object a line in, one out: ``{"open": url}``, ``{"run": javascript}`` (the value of the
last expression), ``{"resize": [width, height]}``, ``{"save": path}`` (a PNG of what is seen),
``{"complaints": null}`` (what scripts wrote to the console). Qt is in this process alone, so that a
browser that falls over takes no test along.
"""

from __future__ import annotations

import json
import os
import sys
import threading

os.environ["QT_QPA_PLATFORM"] = "offscreen"
# Chromium refuses its sandbox to root; the pages it sees here are our own.
os.environ["QTWEBENGINE_DISABLE_SANDBOX"] = "1"
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--disable-gpu"

try:
    from PyQt6.QtCore import QObject, QTimer, QUrl, pyqtSignal
    from PyQt6.QtWebEngineCore import QWebEnginePage
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication
except ImportError as error:
    # PyQt6-WebEngine itself, or a library of the system that it needs, which is named.
    print(json.dumps({"missing": str(error)}), flush=True)
    sys.exit(3)


class Page(QWebEnginePage):
    """Keeps what scripts complain of."""

    def __init__(self, parent: QObject) -> None:
        super().__init__(parent)
        self.complaints: list[str] = []

    def javaScriptConsoleMessage(self, level, message, line, source) -> None:  # noqa: N802
        if level != QWebEnginePage.JavaScriptConsoleMessageLevel.InfoMessageLevel:
            self.complaints.append(f"{source}:{line}: {message}")


class Driver(QObject):
    told = pyqtSignal(str)
    ended = pyqtSignal()

    def __init__(self) -> None:
        super().__init__()
        self.view = QWebEngineView()
        self.page = Page(self.view)
        self.view.setPage(self.page)
        self.page.loadFinished.connect(lambda ok: self.answer(ok))
        self.told.connect(self.do)
        self.ended.connect(QApplication.quit)
        self.view.resize(1280, 800)
        self.view.show()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        for line in sys.stdin:
            self.told.emit(line)
        self.ended.emit()

    def do(self, line: str) -> None:
        ((what, value),) = json.loads(line).items()
        if what == "open":
            self.page.load(QUrl(value))
        elif what == "run":
            self.page.runJavaScript(value, self.answer)
        elif what == "resize":
            self.view.resize(*value)
            self.answer(True)
        elif what == "save":
            # What was changed last has to be painted first.
            QTimer.singleShot(300, lambda: self.answer(self.view.grab().save(value)))
        elif what == "complaints":
            self.answer(self.page.complaints)

    def answer(self, value: object) -> None:
        print(json.dumps({"value": value}), flush=True)


def main() -> int:
    application = QApplication(sys.argv[:1])
    driver = Driver()
    print(json.dumps({"value": "ready"}), flush=True)
    status = application.exec()
    # In this order; the profile complains of pages that outlive it.
    driver.view.setPage(None)
    return status


if __name__ == "__main__":
    sys.exit(main())
