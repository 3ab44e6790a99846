# Copyright (c) mmbasis authors. All rights reserved.
import numpy as np
import torch
from mmengine.logging import HistoryBuffer, MessageHub

from mmbasis.utils.io import from_plain, to_plain


def history():
    buffer = HistoryBuffer(max_length=50)
    for i in range(7):
        buffer.update(i / 3, 2)
    return buffer


def test_plain_types_are_readable_without_pickle(tmp_path):
    value = dict(
        number=np.float64(0.5),
        count=np.int64(3),
        array=np.arange(3),
        nested=[dict(x=np.float32(0.25)), (1, np.bool_(True))],
        tensor=torch.ones(2),
        text='a',
        none=None,
        history=history())
    torch.save(to_plain(value), tmp_path / 'x.pth')
    again = torch.load(tmp_path / 'x.pth', weights_only=True)
    assert again['number'] == 0.5 and type(again['number']) is float
    assert again['count'] == 3 and type(again['count']) is int
    assert again['array'] == [0, 1, 2]
    assert again['nested'] == [dict(x=0.25), (1, True)]
    assert torch.equal(again['tensor'], torch.ones(2))


def test_histories_come_back():
    again = from_plain(to_plain(dict(a=dict(loss=history()), b=[1])))
    assert again['b'] == [1]
    loss = again['a']['loss']
    assert isinstance(loss, HistoryBuffer)
    for mine, theirs in zip(loss.data, history().data):
        np.testing.assert_array_equal(mine, theirs)
    assert loss.mean(5) == history().mean(5)
    for i in range(60):
        loss.update(i)
    assert len(loss.data[0]) == 50  # its limit has come back, too


def test_message_hub_comes_back():
    hub = MessageHub('test_message_hub_comes_back')
    hub.update_scalar('train/loss', 0.5, 4)
    hub.update_scalar('train/loss', 0.25, 4)
    hub.update_info('iter', np.int64(7))
    state = from_plain(to_plain(hub.state_dict()))
    other = MessageHub('test_message_hub_comes_back_again')
    other.load_state_dict(state)
    assert other.get_scalar('train/loss').current() == (
        hub.get_scalar('train/loss').current())
    assert other.get_info('iter') == 7
