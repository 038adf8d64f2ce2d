"""Every test of the definitions once more, with the public calls on the Triton path."""

import pytest
from test_gae import *  # noqa: F403
from test_linear_token_logprobs import *  # noqa: F403
from test_ppo_loss import *  # noqa: F403
from test_token_logprobs import *  # noqa: F403

pytestmark = [
    pytest.mark.usefixtures("triton_path"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


@pytest.fixture(autouse=True)
def narrow_slabs(monkeypatch):
    """A vocabulary of a few hundred words is several slabs of the linear op."""
    monkeypatch.setattr("minirlhf_kernels.fused.linear.SLAB", 1)


@pytest.fixture
def at_once():
    """The reference's own: one way is enough here."""


# It counts the elements of any tensor, and sees the interpreter's own views of memory, in bytes: test_triton_ops.py has
# its twin.
del test_the_linear_op_never_holds_all_logits  # noqa: F821
# Of the definitions' own memory and products; the interpreter serves one thread at a time.
del test_the_room_that_is_kept_is_nobody_else_s  # noqa: F821
del test_what_is_read_in_a_pass_less  # noqa: F821
del test_a_trace_of_one_batch_is_refused  # noqa: F821
del test_one_chunk_of_logits_waits_for_the_backward_several_do_not  # noqa: F821
del test_the_gradient_of_hopeless_tokens  # noqa: F821
if not __import__("torch").cuda.is_available():
    # 16,000 steps in a scan that the interpreter walks one by one would take minutes.
    del test_float32_stays_close_to_float64_over_a_long_buffer  # noqa: F821
