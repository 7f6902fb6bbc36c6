"""Sentences spoken by espeak-ng, whose library says when each word begins: `apt-get install espeak-ng` installs it."""

from __future__ import annotations

import ctypes
import math
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

RATE = 16000  # of Whisper's sounds; espeak-ng speaks at 22,050
SPEED = 140  # words a minute
VOICES = ("en-us", "en-us+f3")
LIBRARY = "libespeak-ng.so.1"
SENTENCES = """The children played in the garden until the sun went down.
She bought three apples and a bottle of milk at the market.
My brother works in a large hospital near the river.
We will meet again tomorrow morning at the train station.
The old man opened the window and looked at the mountains.
Please close the door before you leave the house.
He wrote a long letter to his sister last summer.
The doctor told him to drink more water every day.
They sold their car and moved to another country.
I would like a cup of coffee with a little sugar.
The teacher asked a question and nobody knew the answer.
Our train arrived two hours late because of the snow.
The government announced a new plan to build more houses.
A black cat was sleeping under the kitchen table.
It is important to eat fresh fruit and vegetables.
The company will open a new office in London next year.
Many people visit this museum during the winter holidays.
Her father drives a yellow bus through the city.
The water in the lake is very cold in the morning.
The soldiers walked slowly across the wooden bridge.
You can find more information on the second page.
The scientist discovered a small planet near a distant star.
He forgot his umbrella and came home completely wet.
The president said that the meeting was a great success.
My sister plays the piano in a small orchestra.
The farmer keeps twenty cows and a few horses.
They painted the kitchen walls in a bright yellow.
The bus to the airport leaves every half hour.
We had dinner at a small restaurant by the sea.
The students finished their work before the end of the week.
Someone left a red bicycle in front of our house.
The nurse gave the patient a glass of orange juice.
He turned off the radio and went to bed early.
The new bridge will connect the island with the city.
Her grandmother told us a story about a clever fox.
The airport was closed because of a heavy storm.
The boy threw the ball over the garden wall.
She is learning to speak Spanish and Italian this year.
The library has more than a million books and maps.
The price of bread has increased again this month.
The dog waited at the door for its owner.
A strong wind broke the branches of the old tree.
The police found the stolen money in an empty garage.
We watched the ships from the top of the hill.
The baker sells fresh bread and cakes every morning.
The judge asked the witness to tell the whole truth.
My uncle built a wooden boat with his own hands.
The river flows through a deep and narrow valley.""".splitlines()


@dataclass(frozen=True)
class Speech:
    """A wave (N,) of RATE samples a second, and the words with the seconds between which each is spoken."""

    wave: np.ndarray[Any, Any]
    words: list[tuple[str, float, float]]

    @property
    def end(self) -> float:
        return len(self.wave) / RATE


class _Event(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("type", "message", "text_position", "length", "milliseconds", "sample")),
        *(("data", ctypes.c_void_p), ("id", ctypes.c_int64)),
    )


_WORD, _END = 1, 5  # types of events; 0 ends a list of them
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@cache
def _library() -> tuple[Any, int]:
    """The library, and its samples a second."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise ModuleNotFoundError(f"{LIBRARY} is missing; `apt-get install espeak-ng` installs it") from error
    return library, library.espeak_Initialize(2, 0, None, 0)  # 2: it returns when all is spoken


def spoken_by(number: int) -> tuple[str, str]:
    """A sentence of the list and its voice: voices take turns, and the second time each sentence has another one."""
    return SENTENCES[number % len(SENTENCES)], VOICES[(number + number // len(SENTENCES)) % len(VOICES)]


def spoken(number: int) -> Speech:
    """A sentence after half a second to three seconds of silence."""
    lead = np.zeros(int(RATE * random.Random(number).uniform(0.5, 3)), np.float32)
    speech, before = say(*spoken_by(number)), len(lead) / RATE
    return Speech(np.concatenate([lead, speech.wave]), [(word, a + before, b + before) for word, a, b in speech.words])


def say(text: str, voice: str) -> Speech:
    """A text; words that espeak-ng speaks as one ("in the") have its interval."""
    from scipy.signal import resample_poly

    library, rate = _library()
    chunks, starts, ends = list[Any](), dict[int, float](), list[float]()

    def receive(wave: Any, count: int, events: Any) -> int:
        if wave and count:
            chunks.append(np.ctypeslib.as_array(wave, (count,)).copy())
        for event in iter_events(events):
            place = event.text_position - 1
            if event.type == _WORD and place > max(starts, default=-1):  # one more without a place may follow the last word
                starts[place] = event.sample / rate
            elif event.type == _END:
                ends.append(event.sample / rate)
        return 0

    callback = _CALLBACK(receive)
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(voice.encode()):
        raise ValueError(f"voice must be one of espeak-ng; got {voice!r}")
    library.espeak_SetParameter(1, SPEED, 0)
    data = text.encode() + b"\0"
    library.espeak_Synth(data, len(data), 0, 1, 0, 1, None, None)  # characters from the first on, in UTF-8
    library.espeak_Synchronize()
    samples = np.concatenate(chunks) / 32768
    bounds = [*starts.values(), min(max(ends, default=math.inf), len(samples) / rate)]
    words, at = [], 0
    for word in text.split():
        at = text.index(word, at)
        which = max((number for number, place in enumerate(starts) if place <= at), default=0)
        words.append((word, bounds[which], bounds[which + 1]))
        at += len(word)
    shared = math.gcd(RATE, rate)
    return Speech(resample_poly(samples, RATE // shared, rate // shared).astype(np.float32), words)


def iter_events(events: Any) -> Any:
    number = 0
    while events[number].type:
        yield events[number]
        number += 1
