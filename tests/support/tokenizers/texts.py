"""Texts that tokenizers are tried on: code, prose in five scripts, emoji, chat markers, and awkward spaces."""

from __future__ import annotations

from typing import Final

CODE: Final = (
    'def area(radius: float) -> float:\n    """Of a circle."""\n    return 3.14159 * radius ** 2\n',
    "for (int i = 0; i < n; ++i) {\n\tsum += values[i] & 0xFF;  // the low byte\n}",
    "SELECT name, COUNT(*) FROM shards WHERE state != 'done' GROUP BY name;",
    '{"id": 17, "tags": ["a", "b"], "nested": {"deep": null}}',
)
PROSE: Final = (
    "The lighthouse keeper wrote down the weather every evening, and every morning he compared it with the sea.",
    "Der Bäcker öffnete früh; die Straße roch nach Brot, und süße Brötchen lagen schon im Fenster.",
    "Старый мост через реку скрипел, когда по нему проезжали тяжёлые телеги.",
    "在山脚下的小村子里,人们每天清晨去井边打水,然后一起喝茶。",
    "كان البحر هادئا في الصباح، وعاد الصيادون قبل الظهر.",
    "गाँव के पास एक पुराना पेड़ था, जिसके नीचे बच्चे खेलते थे।",
)
EMOJI: Final = ("Well done 🎉🎉 👩‍🚀 and 👍🏽!", "🇩🇪 → 🇯🇵, 3 × 4 ≠ 13 ☕️")
CHAT: Final = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n",
    "[INST] Summarise this. [/INST] It is short.</s>",
    '<tool_call>{"name": "add", "arguments": [1, 2]}</tool_call>',
)
SPACES: Final = ("  two  spaces  ", "\n\n\ttab and lines\r\n", "don't can't we've I'LL", "1234567890 12.5e-3", "a")

TEXTS: Final = (*CODE, *PROSE, *EMOJI, *CHAT, *SPACES)
