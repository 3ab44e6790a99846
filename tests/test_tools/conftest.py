# Copyright (c) mmbasis authors. All rights reserved.
import pytest

from tests.test_tools.workplace import Forks, Workplace


@pytest.fixture(scope='module')
def workplace(tmp_path_factory, repo_root):
    workplace = Workplace(tmp_path_factory.mktemp('workplace'), repo_root)
    workplace.forks = Forks()
    yield workplace
    workplace.forks.close()
