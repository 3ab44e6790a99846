# Copyright (c) mmbasis authors. All rights reserved.
"""Undoes changes of settings when the benchmark ends, however it ends.

A process of its own holds the list of commands that restore the device. Its
standard input is a pipe from the benchmark: when that closes, after a normal
end, an error, Ctrl-C or SIGKILL alike, it runs the commands, last first. So
there is one way of restoring, and it is used every time.

Lines to it: a JSON object ``{"undo": [command]}``, ``{"result": path}`` (the
file to mark as partial if the benchmark dies) or ``{"done": true}``. Each is
answered by ``ok``, so a setting is changed only when its undoing is known.
"""
import contextlib
import json
import os
import signal
import subprocess
import sys

if __name__ == '__main__':  # started as a program: find the package
    sys.path.insert(
        0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jetson.util import (  # noqa: E402
    BenchError,
    read_json,
    run_tool,
    write_json,
)

DIED = 'the benchmark process died'


class Guard:
    """The benchmark's end of the pipe; use it in a ``with`` block."""

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True)  # out of reach of Ctrl-C
        return self

    def tell(self, **message):
        """Hands over one message and waits for its receipt.

        Raises:
            BenchError: the guard does not answer.
        """
        try:
            self._process.stdin.write(json.dumps(message).encode() + b'\n')
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = b''
        if answer.strip() != b'ok':
            raise BenchError('the process that restores settings ended; '
                             'nothing was changed after that')

    def __exit__(self, kind, value, trace):
        with contextlib.suppress(BenchError):
            self.tell(done=True)
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        if self._process.returncode and kind is None:
            raise BenchError('some settings could not be restored; the '
                             'messages above say which')


def _restore(commands):
    """Runs the commands, last first; returns the number of failures."""
    failures = 0
    for command in reversed(commands):
        status, text = run_tool(command)
        if status != 0:
            failures += 1
            sys.stderr.write(
                'COULD NOT RESTORE by `{}` (status {}): {}\n'.format(
                    ' '.join(command), status, text.strip()))
    return failures


def _mark_partial(path):
    try:
        result = read_json(path, 'result')
        if result.get('status') == 'running':
            result.update(status='partial', reason=DIED)
            write_json(path, result)
    except (BenchError, OSError):
        return


def main():
    """Runs as a process: reads messages until its input closes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    undo, result, done = [], None, False
    for line in iter(sys.stdin.readline, ''):
        message = json.loads(line)
        if 'undo' in message:
            undo.append(message['undo'])
        result = message.get('result', result)
        done = done or 'done' in message
        sys.stdout.write('ok\n')
        sys.stdout.flush()
    if not done:
        sys.stderr.write('{}; {}{}\n'.format(
            DIED, 'settings are being restored'
            if undo else 'no setting had been changed',
            '; partial results are in ' + result if result else ''))
    failures = _restore(undo)
    if result:  # still marked as running if the end itself was cut short
        _mark_partial(result)
    sys.exit(1 if failures else 0)


if __name__ == '__main__':
    main()
