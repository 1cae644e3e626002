//! What is heard on a track, as an egress streams it, and a record of that in few bytes.

use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use crate::support::egress_peer::{BINARY, CHUNK_BYTES, counter_pcm, frame};

/// Frames of 16-bit stereo in one message.
pub const CHUNK_FRAMES: u32 = 480;
const FRAME_BYTES: usize = 4;
/// The longest stretch that the record has one time for.
const STRETCH_FRAMES: u32 = 48_000;

/// The sound of a track.
#[derive(Clone, Debug)]
pub enum Audio {
    /// Frames that count up, from another number for each egress (see [`counter_pcm`]).
    Counter,
    Silence,
    /// This once from the start of each egress, then silence. Made by [`Audio::pcm`].
    Pcm(Arc<[u8]>),
}

impl Audio {
    /// Interleaved 16-bit stereo at 48 kHz, filled up with silence to whole messages as LiveKit's mixer does.
    pub fn pcm(pcm: &[u8]) -> Self {
        let mut whole = pcm.to_vec();
        whole.resize(pcm.len().next_multiple_of(CHUNK_BYTES), 0);
        Self::Pcm(whole.into())
    }
}

/// The content of one message or more.
#[derive(Clone, Debug)]
enum Content {
    Counter(u32),
    Silence,
    Pcm(Arc<[u8]>, usize),
}

/// Up to a second of one content.
#[derive(Clone, Debug)]
pub struct Stretch {
    /// When its first message was sent.
    pub at: SystemTime,
    pub frames: u32,
    content: Content,
}

impl Stretch {
    fn bytes(&self) -> Vec<u8> {
        let length = self.frames as usize * FRAME_BYTES;
        match &self.content {
            Content::Counter(first) => counter_pcm(self.frames as usize, *first),
            Content::Silence => vec![0; length],
            Content::Pcm(pcm, offset) => pcm[*offset..*offset + length].to_vec(),
        }
    }

    fn continues_with(&self, next: &Content) -> bool {
        match (&self.content, next) {
            (Content::Counter(first), Content::Counter(next)) => first.wrapping_add(self.frames) == *next,
            (Content::Silence, Content::Silence) => true,
            (Content::Pcm(one, offset), Content::Pcm(other, next)) => Arc::ptr_eq(one, other) && offset + self.frames as usize * FRAME_BYTES == *next,
            _ => false,
        }
    }
}

/// What one egress has handed to the network whole, in order.
#[derive(Clone, Debug, Default)]
pub struct Sent {
    pub egress_id: String,
    pub stretches: Vec<Stretch>,
}

impl Sent {
    pub fn bytes(&self) -> Vec<u8> {
        self.stretches.iter().flat_map(Stretch::bytes).collect()
    }

    pub fn frames(&self) -> u64 {
        self.stretches.iter().map(|stretch| u64::from(stretch.frames)).sum()
    }

    pub fn duration(&self) -> Duration {
        Duration::from_micros(self.frames() * 1_000_000 / 48_000)
    }

    fn add(&mut self, content: Content, at: SystemTime) {
        match self.stretches.last_mut() {
            Some(last) if last.frames < STRETCH_FRAMES && last.continues_with(&content) => last.frames += CHUNK_FRAMES,
            _ => self.stretches.push(Stretch { at, frames: CHUNK_FRAMES, content }),
        }
    }
}

/// The place in the sound where an egress is.
#[derive(Debug)]
pub struct Cursor {
    counter: u32,
    offset: usize,
}

/// Messages on their way, and what the record will say of them.
#[derive(Debug, Default)]
pub struct Burst {
    pub wire: Vec<u8>,
    contents: Vec<Content>,
}

impl Burst {
    pub fn record(self, sent: &mut Sent) {
        let now = SystemTime::now();
        self.contents.into_iter().for_each(|content| sent.add(content, now));
    }
}

impl Cursor {
    /// `ordinal` keeps the counters of egresses apart: more than three minutes of audio lie between them.
    pub fn new(ordinal: usize) -> Self {
        Self { counter: (ordinal as u32).wrapping_mul(10_000_000).wrapping_add(1), offset: 0 }
    }

    /// Adds the next message to a burst. A muted track is silent, and its sound goes on after it where it was.
    pub fn next(&mut self, audio: &Audio, muted: bool, burst: &mut Burst) {
        let content = match audio {
            Audio::Counter if !muted => {
                let first = self.counter;
                self.counter = first.wrapping_add(CHUNK_FRAMES);
                burst.wire.extend_from_slice(&counter_message(first));
                Content::Counter(first)
            }
            Audio::Pcm(pcm) if !muted && self.offset < pcm.len() => {
                let offset = self.offset;
                self.offset += CHUNK_BYTES;
                burst.wire.extend_from_slice(&frame(BINARY, true, &pcm[offset..self.offset], true));
                Content::Pcm(Arc::clone(pcm), offset)
            }
            Audio::Counter | Audio::Pcm(_) | Audio::Silence => {
                burst.wire.extend_from_slice(&SILENCE);
                Content::Silence
            }
        };
        burst.contents.push(content);
    }
}

/// The same bytes each time, so that hundreds of silent tracks cost nothing.
static SILENCE: LazyLock<Vec<u8>> = LazyLock::new(|| frame(BINARY, true, &[0; CHUNK_BYTES], true));

/// A message of counting frames, masked four bytes at a time.
fn counter_message(first: u32) -> Vec<u8> {
    let mut message = frame(BINARY, true, &[], true); // for its opcode and its key
    let key = u32::from_le_bytes(*message.last_chunk().expect("a key"));
    message.splice(1..2, [0x80 | 126, (CHUNK_BYTES >> 8) as u8, (CHUNK_BYTES & 0xFF) as u8]);
    let header = message.len();
    message.resize(header + CHUNK_BYTES, 0);
    for (slot, step) in message[header..].chunks_exact_mut(FRAME_BYTES).zip(0..) {
        slot.copy_from_slice(&(first.wrapping_add(step) ^ key).to_le_bytes());
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quick_way_makes_the_same_message_as_the_plain_one() {
        let quick = counter_message(u32::MAX - 100);
        let key: [u8; 4] = *quick[4..].first_chunk().expect("a key");
        let plain: Vec<u8> = quick[8..].iter().zip(key.iter().cycle()).map(|(byte, key)| byte ^ key).collect();
        assert_eq!(quick[..4], [0x82, 0xFE, 0x07, 0x80]);
        assert_eq!(plain, counter_pcm(480, u32::MAX - 100));
    }
}
