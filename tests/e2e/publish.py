#!/usr/bin/env python3
"""Joins a LiveKit room and publishes a WAV file as its microphone, in real time and again from its start, until its own input ends; then it leaves.

    publish.py [--encrypted] URL TOKEN SPEECH.wav

Room, identity, name, metadata and attributes are the token's. Its output is `joined <participant SID>`, `published <track SID>`, `left`, a line each.
"""

import argparse
import asyncio
import sys
import wave

from livekit import rtc

# How many pieces a second of speech is handed over in.
PIECES = 100


def say(*words):
    print(*words, flush=True)


async def input_ends():
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


async def speak(source, speech):
    frames = speech.getframerate() // PIECES
    while True:
        pcm = speech.readframes(frames)
        if not pcm:
            speech.rewind()
            continue
        # Returns when the queue has room for it: that keeps real time.
        await source.capture_frame(rtc.AudioFrame(pcm, source.sample_rate, source.num_channels, len(pcm) // 2 // source.num_channels))


async def attend(room, given):
    options = rtc.RoomOptions()
    if given.encrypted:
        options.encryption = rtc.E2EEOptions(key_provider_options=rtc.KeyProviderOptions(shared_key=b"known to those who speak"))
    await room.connect(given.url, given.token, options)
    say("joined", room.local_participant.sid)
    with wave.open(given.speech) as speech:
        if speech.getsampwidth() != 2:
            sys.exit(f"{given.speech} is not 16-bit PCM")
        source = rtc.AudioSource(speech.getframerate(), speech.getnchannels())
        microphone = rtc.LocalAudioTrack.create_audio_track("mic", source)
        published = await room.local_participant.publish_track(microphone, rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE))
        say("published", published.sid)
        await speak(source, speech)


async def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--encrypted", action="store_true", help="encrypt end to end, as the room's other clients would")
    arguments.add_argument("url")
    arguments.add_argument("token")
    arguments.add_argument("speech")
    given = arguments.parse_args()

    room = rtc.Room()
    told_to_leave, attending = asyncio.ensure_future(input_ends()), asyncio.ensure_future(attend(room, given))
    await asyncio.wait([told_to_leave, attending], return_when=asyncio.FIRST_COMPLETED)
    if attending.done():
        # It never ends but by a fault, which this raises.
        attending.result()
    attending.cancel()
    await room.disconnect()
    say("left")


asyncio.run(main())
