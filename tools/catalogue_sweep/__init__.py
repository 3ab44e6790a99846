# Copyright (c) mmbasis authors. All rights reserved.
"""The sweep over all models that the installed libraries ship."""
