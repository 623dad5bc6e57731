"""Text that appears while the model writes it, and a conversation with it."""

from typing import TextIO

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase, TextStreamer

from dstrain.errors import UserError
from dstrain.generate.decoding import Decoding
from dstrain.generate.model import LoadedModel
from dstrain.generate.prompts import room_for_prompts
from dstrain.generate.text import continue_prompts
from dstrain.monitor.logs import printable


class _Streamer(TextStreamer):
    """Word by word to a terminal, without the prompt and without what a terminal would obey."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._out.write(printable(text) + ("\n" if stream_end else ""))
        self._out.flush()


def show_continuation(loaded: LoadedModel, prompt: str, decoding: Decoding, out: TextIO) -> None:
    """Write what follows the prompt. Raises UserError for a prompt that leaves no room."""
    ids = loaded.encode_prompts([prompt])[0]
    room = room_for_prompts(loaded.positions, decoding.max_new_tokens) if loaded.positions else len(ids)
    if len(ids) > room:
        raise UserError(
            f"the prompt has {len(ids)} tokens, and with --max_new_tokens {decoding.max_new_tokens} there is room for "
            f"{room}: shorten one of them"
        )
    continue_prompts(loaded, [ids], decoding, _Streamer(loaded.tokenizer, out))


class Conversation:
    """A chat by the tokenizer's template; the model sees all of it at each turn.

    Raises UserError for a tokenizer without one.
    """

    def __init__(self, loaded: LoadedModel, decoding: Decoding, out: TextIO):
        if not loaded.tokenizer.chat_template:
            raise UserError(
                f"--chat: the tokenizer of {loaded.source} has no chat template: give one with "
                "--chat_template FILE, or write --prompt"
            )
        self._loaded, self._decoding, self._out = loaded, decoding, out
        self._messages: list[dict[str, str]] = []

    def hold(self, lines: TextIO) -> None:
        """Answer line after line, until /exit or their end."""
        self._say("/reset begins anew, /exit ends the conversation")
        while True:
            self._say("> ", end="")
            line = lines.readline()
            if not line:
                self._say("")  # leaves the line that the end of the input stands in
                return
            if line.strip() == "/exit":
                return
            if line.strip() == "/reset":
                self._messages = []
            elif line.strip():
                self._answer(line.strip())

    def _answer(self, text: str) -> None:
        """One turn; a turn that cannot be answered is taken back."""
        loaded, decoding = self._loaded, self._decoding
        asked = [*self._messages, {"role": "user", "content": text}]
        try:
            encoded = loaded.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
        except TemplateError as error:
            self._say(f"the template refuses this: {' '.join(str(error).split())}")
            return
        ids = encoded["input_ids"]
        if loaded.positions and len(ids) + decoding.max_new_tokens > loaded.positions:
            self._say(f"the conversation has reached the model's {loaded.positions} tokens: /reset")
            return
        new = continue_prompts(loaded, [ids], decoding, _Streamer(loaded.tokenizer, self._out))[0]
        answer = loaded.tokenizer.decode(new, skip_special_tokens=True)
        self._messages = [*asked, {"role": "assistant", "content": answer}]

    def _say(self, text: str, end: str = "\n") -> None:
        self._out.write(text + end)
        self._out.flush()
