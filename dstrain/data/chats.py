"""Chats as texts: rendered by the tokenizer's own chat template, with the characters that the model has to write."""

import re
from collections.abc import Sequence
from typing import Any

from dstrain.data.rows import Chat
from dstrain.data.templates import RowError
from dstrain.data.tokenization import TextEncoder
from dstrain.errors import UserError

Spans = tuple[tuple[int, int], ...]
"""Ranges of characters, in order and apart."""


class ChatRenderer:
    """Renders chats and finds their answers.

    An answer is what the model itself writes after the generation prompt: the content of an assistant's turn and the
    end-of-turn behind it. White space after that is the template's.
    """

    def __init__(self, encoder: TextEncoder):
        """Raises UserError for a tokenizer without a template or without the fast backend."""
        self._tokenizer = encoder.tokenizer
        if not encoder.knows_places:
            raise UserError(
                "chats need a tokenizer of the tokenizers library, which says where in the text a token was: "
                "this one is written in Python, so give rows of prompt and completion, or take another"
            )
        try:
            self._template = self._tokenizer.get_chat_template()
        except ValueError:
            raise UserError(
                "the data hold chats and the tokenizer has no chat template: give one with --chat_template FILE"
            ) from None
        self._marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", self._template) is not None

    def texts(self, chat: Chat) -> list[tuple[str, Spans]]:
        """Whole chats: (text, its answers). Usually one.

        A template that rewrites what was said before (Qwen3 drops the thoughts of earlier turns) shows no answer in the
        whole chat as the model would have written it. Then every answer is a text of its own: what the model would
        have seen at its turn, and what it should have written. Raises RowError for a chat that the template refuses.
        """
        whole = self.whole(chat)
        if self._marks_answers:
            return [(whole, self._marked(chat))]
        turns = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and i >= chat.first]
        answers = [self._answer(chat.messages[: i + 1]) for i in turns]
        if all(whole.startswith(text) for text, _ in answers):
            return [(whole, tuple(span for _, span in answers))]
        return [(text, (span,)) for text, span in answers]

    def whole(self, chat: Chat) -> str:
        return self._render(chat.messages)

    def _answer(self, messages: Sequence[dict[str, Any]]) -> tuple[str, tuple[int, int]]:
        """The chat up to its last message, and where in it that answer is."""
        before, after = self._render(messages[:-1], add_generation_prompt=True), self._render(messages)
        if not after.startswith(before):
            raise RowError(
                "refused by the chat template",
                f": the chat template asks for an answer ({before[-30:]!r}) in another way than it shows one: "
                "give another with --chat_template",
            )
        answer = after[len(before) :]
        last_word = "".join(messages[-1]["content"].split()[-1:])  # what stands before it may be rewritten
        at = answer.rfind(last_word) if last_word else 0
        if at < 0:
            problem = f": the chat template leaves the answer out (it wrote {answer[:30]!r}): give another with"
            raise RowError("refused by the chat template", f"{problem} --chat_template")
        tail = answer[at + len(last_word) :]
        if not tail:
            raise UserError(
                "the chat template writes nothing behind an answer, so that the model would never learn to stop: "
                "give one that does with --chat_template FILE"
            )
        # An end-of-turn that is nothing but white space ("Assistant: yes\n") is the model's own.
        end = len(answer.rstrip()) if tail.strip() else len(answer)
        return after, (len(before), len(before) + end)

    def _marked(self, chat: Chat) -> Spans:
        """The answers that the template itself marks with {% generation %}."""
        from transformers.utils.chat_template_utils import render_jinja_template

        _, ((*spans,),) = render_jinja_template(
            [list(chat.messages)],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        num_before = sum(message["role"] == "assistant" for message in chat.messages[: chat.first])
        num_answers = sum(message["role"] == "assistant" for message in chat.messages)
        if num_before and len(spans) != num_answers:
            problem = f": the chat template marks {len(spans)} answers of {num_answers}: write it as one chat"
            raise RowError("refused by the chat template", problem)
        return tuple(spans[num_before:])

    def _render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template is no Jinja (line {error.lineno}: {error.message}): mend it") from None
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RowError("refused by the chat template", f" is refused by the chat template ({reason})") from None
