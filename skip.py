"""Finished work is skipped before torch is imported, which takes seconds.

A command that has ended well leaves a stamp: what it printed, and sizes and times of the files of
its result and of the code. While these are unchanged the same command prints the same and ends.
"""

import hashlib
import json
import os
import pathlib
import sys


def stamp_path():
    """Where the stamp of this process's command line lies, relative to the working directory."""
    command = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    digest = hashlib.sha256(json.dumps(command).encode()).hexdigest()
    return pathlib.Path('ckpts/.finished', f'{digest[:16]}.json')


def state(files):
    """{file: [size, time]}."""
    return {str(f): [os.stat(f).st_size, os.stat(f).st_mtime_ns] for f in files}


def exit_if_finished(name):
    """Ends the process, printing what the command printed, if its result is still there."""
    if name != '__main__' or 'RANK' in os.environ:  # processes of one job must not differ
        return
    try:
        stamp = json.loads(stamp_path().read_text())
        unchanged = state(stamp['files']) == stamp['files']
    except (OSError, ValueError):  # there is none, or half of one, or a file is gone
        return
    if unchanged:
        sys.stdout.write(stamp['printed'])
        sys.exit()


def leave_stamp(files, printed):
    """Records that this command succeeded, what it printed, and the `files` of its result."""
    path, code = stamp_path(), pathlib.Path(__file__).parent.glob('*.py')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({'files': state([*files, *code]), 'printed': printed}))


class Tee:
    """A stream that passes its text on to another one, at once, and keeps it."""

    def __init__(self, stream):
        self.stream, self.text = stream, ''

    def write(self, text):
        self.text += text
        self.stream.write(text)
        self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)
