"""A local S3 server for tests, where its packages are installed; without them what asks for it is skipped.

They are not in the pinned set: botocore asks for python-dateutil < 3. To run these tests, install s3fs and moto[server]
in an environment of their own resolution, or into a folder on PYTHONPATH.
"""

import importlib.util
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def object_store() -> Iterator[str]:
    """URL of a folder in a bucket of its own."""
    if missing := [name for name in ("s3fs", "moto", "flask", "flask_cors") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"no S3 client and server: {', '.join(missing)} not installed; see tests/object_store.py")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    changed = {**CREDENTIALS, "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        import fsspec
        from fsspec.config import conf, set_conf_env

        kept = dict(conf)
        set_conf_env(conf)
        bucket = f"vespo-{uuid.uuid4().hex}"
        fsspec.filesystem("s3").mkdir(bucket)
        yield f"s3://{bucket}/run"
    finally:
        conf.clear()
        conf.update(kept)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.stop()
