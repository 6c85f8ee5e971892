import numpy as np
import pytest
from numpy.typing import NDArray

from encoder.packing import KEY_INTERVAL_FRAMES, KEY_INTERVAL_NS, Packer
from encoder.sampling import Operator, OperatorError
from protos.payload import Payload
from protos.v1 import veilcam_pb2 as pb
from tests.conftest import frame_of


def levels_of(message: pb.Frame, last: NDArray[np.int16] | None) -> NDArray[np.int16]:
    values = Payload.unpack(message.payload).planes[0].values
    return values if message.kind == pb.FRAME_KIND_KEY or last is None else values + last


def test_keys_and_deltas_tell_the_same_as_the_quantiser(
    operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    packer, last = Packer(operator, 0.1), None
    for sequence, picture in enumerate(photographs, 1):
        message, stages = packer.pack(frame_of(picture, sequence), sequence)
        last = levels_of(message, last)
        expected = operator.quantise(operator.sample(picture, 26), (21, 28))
        assert np.array_equal(last, expected)
        assert message.sequence == sequence
        assert list(message.planes) == [pb.PLANE_KIND_LUMA]
        assert min(stages.sample, stages.quantise, stages.pack) > 0


def test_a_delta_is_sent_where_it_is_smaller(operator: Operator, photographs: list[NDArray[np.uint8]]) -> None:
    packer = Packer(operator, 0.1)
    first, alike, other = photographs[0], photographs[1], photographs[-1]
    messages = [packer.pack(frame_of(p, i), i)[0] for i, p in enumerate((first, alike, other), 1)]
    assert [m.kind for m in messages] == [pb.FRAME_KIND_KEY, pb.FRAME_KIND_DELTA, pb.FRAME_KIND_KEY]
    assert [m.base_sequence for m in messages] == [0, 1, 0]
    assert len(messages[1].payload) < len(messages[0].payload)


def test_a_base_is_the_frame_sent_before_even_over_a_gap(
    operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    packer = Packer(operator, 0.1)
    packer.pack(frame_of(photographs[0], 1), 3)
    message, _ = packer.pack(frame_of(photographs[1], 2), 9)
    assert (message.sequence, message.base_sequence) == (9, 3)


@pytest.mark.parametrize("later_ns", [KEY_INTERVAL_NS, -5])
def test_keys_come_every_few_seconds_and_when_the_clock_jumps(
    operator: Operator, photographs: list[NDArray[np.uint8]], later_ns: int
) -> None:
    packer, start = Packer(operator, 0.1), 10**18
    packer.pack(frame_of(photographs[0], start), 1)
    for number in range(2, KEY_INTERVAL_FRAMES + 1):
        assert packer.pack(frame_of(photographs[0], start + number), number)[0].kind == pb.FRAME_KIND_DELTA
    assert packer.pack(frame_of(photographs[0], start + later_ns), 100)[0].kind == pb.FRAME_KIND_KEY


def test_a_key_comes_when_it_is_asked_for(operator: Operator, photographs: list[NDArray[np.uint8]]) -> None:
    packer = Packer(operator, 0.1)
    packer.pack(frame_of(photographs[0], 1), 1)
    assert packer.pack(frame_of(photographs[0], 2), 2, key=True)[0].kind == pb.FRAME_KIND_KEY


def test_a_ratio_beyond_the_operator_is_refused(operator: Operator) -> None:
    with pytest.raises(OperatorError):
        Packer(operator, 0.9)
