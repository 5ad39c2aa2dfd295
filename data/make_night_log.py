"""Write night_log.txt, the built-in corpus: the log of an observatory that is not there, from a small grammar.

    python data/make_night_log.py

The text is a function of this file alone, on every platform.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

SIZE = 272 * 1024  # bytes, at least

# In a rule, {name} stands for a random entry of that list; {a-b} for a random whole number from a to b.
RULES = {
    "entry": [
        "Night {1-365}. {observer} on the {telescope}, seeing {1-5}/5, {sky}.",
        "Night {1-365}, {observer} writing. {sky_sentence}",
        "Log of {observer}, night {1-365}: {sky}, {0-9}{0-9}% humidity, {-9-20} degrees.",
    ],
    "sentence": [
        "{sky_sentence}",
        "At {hour} we turned the {telescope} to {star} and {found}.",
        "{star} stood {height} the {place}, and {found}.",
        "The {part} {fault} again, so {observer} {remedy}.",
        "{observer} asked whether {star} had {changed}; {observer} thought that it had not.",
        "We measured {star} against {star}: magnitude {0-6}.{0-9}{0-9}, give or take {1-9} in the last figure.",
        'When the {part} {fault}, {observer} said, "{saying}"',
        '"{saying}" wrote {observer} in the margin, and {found}.',
        "Nothing happened between {hour} and {hour}, which is what a good night looks like.",
        "There were {2-40} plates exposed, {2-9} of them spoiled (the {part} {fault}).",
        "The period comes out as {2-60} days + {0-23} hours, or {1-9}.{0-9} = {1-9}/{2-9} of the old value.",
        "Is the light from {star} steady? {answer}",
        "If the {part} {fault}, then {observer} will have to wait for {star} until the {season}.",
        "Before dawn {observer} closed the dome, {closing}.",
    ],
    "sky_sentence": [
        "The sky was {quality} from {hour} on, and {star} {shone} over the {place}.",
        "Clouds came in from the {direction} at {hour} and stayed until {hour}.",
        "The wind went round to the {direction}; the {part} {fault}.",
        "A {quality} night, with {sky}.",
        "It was {quality} in the {season} way, and there was {sky}.",
    ],
    "sky": ["thin cloud in the {direction}", "no moon", "a young moon", "fog on the {place}", "frost on the {part}",
            "a clear horizon", "some wind from the {direction}", "dew on everything"],
    "observer": ["Ines Okoro", "Tomas Lindqvist", "Dr. Wu", "the night assistant", "old Castellan", "Miss Farrow",
                 "the student", "Bela Novak", "Jun", "Professor Quill"],
    "telescope": ["great refractor", "small refractor", "zenith tube", "meridian circle", "comet seeker", "heliometer"],
    "star": ["Altair", "Bellatrix", "Capella", "Deneb", "Electra", "Fomalhaut", "Gienah", "Hadar", "Izar", "Jabbah",
             "Kochab", "Lesath", "Mirach", "Nunki", "Okab", "Polaris", "Quasar 3C-273", "Rigel", "Sirius", "Thuban",
             "Unukalhai", "Vega", "Wezen", "Xi Puppis", "Yildun", "Zosma"],
    "hour": ["{1-12} o'clock", "{1-9} minutes past {1-12}", "midnight", "half past {1-12}", "{1-12}:{0-5}{0-9}"],
    "height": ["high above", "just over", "well clear of", "far to the {direction} of"],
    "place": ["western ridge", "valley", "water tower", "north dome", "lake", "orchard wall", "village lamps"],
    "direction": ["north", "south", "east", "west", "north-east", "south-west"],
    "season": ["spring", "summer", "autumn", "winter"],
    "quality": ["quiet", "dark", "restless", "brilliant", "grey", "still", "cold and exact", "milky"],
    "shone": ["shone without a flicker", "hung like a lamp", "could be seen by the naked eye", "was lost by {hour}"],
    "found": ["found it where the tables put it", "saw the companion at once", "lost it in the haze",
              "the clock drive kept it on the wire for {2-50} minutes", "made {2-12} settings that agree",
              "could not see the companion at all", "noted a faint glow to the {direction}",
              "the spectrum showed the same {2-9} lines as before"],
    "part": ["clock drive", "shutter", "micrometer", "eyepiece", "dome motor", "plate holder", "finder", "slow motion"],
    "fault": ["stuck", "slipped", "froze", "ran fast by {2-30} seconds", "rattled", "would not answer"],
    "remedy": ["warmed it with a lantern", "used the spare", "turned it by hand until {hour}", "wrote to the maker",
               "took it apart on the kitchen table", "left it for the morning"],
    "changed": ["faded", "brightened", "moved by a hair", "lost its colour", "split in two"],
    "saying": ["Count again, and then count once more.", "The stars are not late; the clock is!",
               "Who left the dome open?",
               "A zero is also a measurement.", "Write down what you saw, not what you hoped.",
               "Never oil it at night!",
               "It was better in the {season}.", "Trust the {part}, doubt the observer."],
    "answer": ["It is, within {1-9} parts in a thousand.", "Nobody at this station can tell.",
               "Ask again in the {season}.",
               "Yes; the plates agree.", "No: it fell by {0-2}.{1-9} since {hour}."],
    "closing": ["tired but content", "with {2-40} pages written", "just ahead of the rain",
                "and the {season} birds began"],
}  # fmt: skip

HOLE = re.compile(r"\{(?:(-?\d+)-(\d+)|(\w+))\}")


class Writer:
    """Expands rules with numbers of one generator. Only ``Random.random`` is used: its values never change."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def number(self, low: int, high: int) -> int:
        return low + int(self._random() * (high - low + 1))

    def expand(self, rule: str) -> str:
        """Return a random entry of the rule's list, its holes filled."""
        entries = RULES[rule]
        return HOLE.sub(self._fill, entries[self.number(0, len(entries) - 1)])

    def _fill(self, hole: re.Match[str]) -> str:
        low, high, rule = hole.groups()
        return self.expand(rule) if rule else str(self.number(int(low), int(high)))

    def paragraph(self) -> str:
        """Return one night: an entry and some sentences."""
        sentences = [self.expand("entry"), *(self.expand("sentence") for _ in range(self.number(2, 9)))]
        return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def night_log(size: int = SIZE) -> str:
    """Return whole paragraphs, one a line, of ``size`` characters or a little more."""
    writer, lines, written = Writer(seed=42), [], 0
    while written < size:
        lines.append(writer.paragraph())
        written += len(lines[-1]) + 1
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_name("night_log.txt").write_text(night_log(), encoding="ascii")
