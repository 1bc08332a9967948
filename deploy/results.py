"""What a session leaves behind when it ends, for whatever reason: summary and report, printed for the person."""

import sys
import time

from buffer.run import Buffer
from deploy.rundir import History, RunDirectory
from deploy.summary import format_summary, write_summary
from protocol.errors import VespoError
from protocol.settings import Settings


def leave_results(settings: Settings, directory: RunDirectory, buffer: Buffer, history: History) -> None:
    """Write summary.json and report.html and print the summary.

    A failure here is told but not raised: it must not hide the reason why the session ended.
    """
    from deploy.report import write_report  # loads matplotlib

    history.sessions[-1].ended_at = time.time()
    try:
        summary = write_summary(settings, directory, buffer, history)
        write_report(directory)
    except (VespoError, OSError) as error:
        print(f"vespo: no summary: {error}", file=sys.stderr)
        return
    print(format_summary(summary, directory))
