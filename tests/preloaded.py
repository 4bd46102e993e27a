"""What the server that `conftest.start` forks from has done beforehand: imports, of which these a command does only when it
needs them. None of it may start a thread."""

import alembic.command  # noqa: F401
import mlflow.store.tracking.sqlalchemy_workspace_store  # noqa: F401
import sklearn.datasets  # noqa: F401
import sqlalchemy.dialects.sqlite  # noqa: F401
import supervision  # noqa: F401
from conftest import processes  # noqa: F401
from PIL import Image
from sqlalchemy.orm import configure_mappers

import pipelines.engine.cli  # noqa: F401

configure_mappers()
Image.init()
