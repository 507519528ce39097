"""The demo's data and questions: the whole recipe in miniature.

The conversations are in the ``messages`` schema; in them the assistant is zephyr-lite. The feedback is in
UltraFeedback's raw schema: four scored completions a prompt, where dodging and rambling ones score low.
"""

from pathlib import Path

_HERE = Path(__file__).parent

CONVERSATIONS = _HERE / "conversations.jsonl"
CONVERSATIONS_TEST = _HERE / "conversations_test.jsonl"
FEEDBACK = _HERE / "feedback.jsonl"
FEEDBACK_TEST = _HERE / "feedback_test.jsonl"

# Asked of the base, the SFT and the DPO model, side by side; none is in the data word for word. Of some sixty candidates,
# these have answers that change from stage to stage.
QUESTIONS = (
    "Who are you, and who made you?",
    "What is the best thing about mornings?",
    "What is your favourite kind of weather?",
)
