//! What holds for any bytes that strangers send or that a disk holds: one function for each place where such bytes are read.
//!
//! Compiled for `cargo fuzz` and for tests only: the targets in `fuzz/` feed them for as long as asked, the tests below with what proptest makes
//! and with the inputs that are kept in `fuzz/corpus`. Each panics where a promise is broken.

use std::cell::Cell;
use std::path::{Component, Path};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, Waker};
use std::time::SystemTime;

use bytes::Bytes;
use chrono::DateTime;
use futures_util::{Stream, stream};

use crate::actors::stats::TrackStats;
use crate::audio::format::PcmFormat;
use crate::clock::Clock;
use crate::http::fuzzed::{IngestQuery, Intake, audio_limits, video_limits};
use crate::http::ws_guard::{GuardLimits, Violation, WsGuard};
use crate::livekit::egress_stream::{TextMessage, parse_text};
use crate::livekit::webhook::{WebhookVerifier, parse, sign};
use crate::recording::path::{SegmentName, below, safe_part};
use crate::recording::repair::{Interrupted, Outcome, repair};
use crate::recording::sidecar;
use crate::recording::wav_header::{self, HEADER_BYTES};

/// The limits of production, but for a pace that no input reaches.
fn unpaced(limits: GuardLimits) -> GuardLimits {
    GuardLimits { bytes_per_second: 1e12, frames_per_second: 1e12, burst_bytes: 1e12, burst_frames: 1e12, ..limits }
}

/// What a guard lets through, in its order.
#[derive(Debug, PartialEq)]
enum Passed {
    /// Frames as they came.
    Frames(Vec<u8>),
    /// Payloads of whole binary messages, which are collected beside them.
    Audio(Vec<u8>),
}

/// Adds what is of the same kind to the last.
fn add(passed: &mut Vec<Passed>, next: Passed) {
    match (passed.last_mut(), next) {
        (Some(Passed::Frames(all)), Passed::Frames(more)) | (Some(Passed::Audio(all)), Passed::Audio(more)) => all.extend(more),
        (_, next) => passed.push(next),
    }
}

/// What a guard's reader is told with when audio has been collected, and a pong that a peer may send too.
const EMPTY_PONG: &[u8] = &[0x8a, 0x80, 0, 0, 0, 0];

/// The bytes of a connection, behind one that says in pieces of how many bytes they come: what passes is a beginning of them, in whole frames,
/// and ends where a reading of all of them at once ends, for the same reason. So it is of video, and of audio, which is collected on the way.
pub fn ws_guard(data: &[u8]) {
    let Some((piece, wire)) = data.split_first() else { return };
    let piece = usize::from(*piece).max(1);
    guarded(wire, piece, unpaced(video_limits(1.0)), false);
    guarded(wire, piece, unpaced(audio_limits(PcmFormat::LIVEKIT, true, 1.0)), true);
}

fn guarded(wire: &[u8], piece: usize, limits: GuardLimits, collecting: bool) {
    let pieces = wire.chunks(piece).map(|piece| Ok(Bytes::copy_from_slice(piece)));
    let violation = Rc::new(Cell::new(None));
    let stats = Arc::new(TrackStats::new(PcmFormat::LIVEKIT, Arc::default()));
    let intake = Rc::new(Intake::alone(PcmFormat::LIVEKIT, stats, Clock::start(), None));
    let mut guard = WsGuard::new(stream::iter(pieces), limits, Rc::clone(&violation));
    if collecting {
        guard = guard.collecting_in(Rc::clone(&intake));
    }
    let mut context = Context::from_waker(Waker::noop());
    let mut passed = Vec::new();
    loop {
        let polled = Pin::new(&mut guard).poll_next(&mut context);
        // As the adapter does: before a frame is looked at, what was collected before it is taken.
        if polled.is_ready()
            && let Some(batch) = intake.take()
        {
            assert!(batch.audio.len() < intake.batch_bytes() + usize::try_from(limits.binary_bytes).expect("a size"), "no more is collected");
            add(&mut passed, Passed::Audio(batch.audio.to_vec()));
        }
        match polled {
            Poll::Ready(Some(Ok(frames))) if frames == EMPTY_PONG => {}
            Poll::Ready(Some(Ok(frames))) => add(&mut passed, Passed::Frames(frames.to_vec())),
            Poll::Ready(Some(Err(_))) => assert!(violation.get().is_some(), "an error is a violation"),
            Poll::Ready(None) => break,
            // It lets its reader look, and wakes it.
            Poll::Pending => {}
        }
    }
    let (expected, broken) = allowed(wire, limits, collecting);
    assert!(passed == expected, "{passed:?} has passed, and {expected:?} breaks no rule");
    assert_eq!(violation.get(), broken);
}

/// The rules of the guard once more, for bytes that are all there: what keeps to them, and what they break.
fn allowed(wire: &[u8], limits: GuardLimits, collecting: bool) -> (Vec<Passed>, Option<Violation>) {
    let (mut at, mut message, mut passed) = (0, None::<(u64, u64, u32)>, Vec::new());
    let broken = loop {
        let rest = wire.get(at..).unwrap_or_default();
        let [first, second, ..] = *rest else { break None };
        let (fin, opcode) = (first & 0x80 != 0, first & 0x0f);
        if first & 0x70 != 0 {
            break Some(Violation::Protocol("reserved bits"));
        }
        if second & 0x80 == 0 {
            break Some(Violation::Protocol("an unmasked frame"));
        }
        let extended = match second & 0x7f {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        let Some(length) = rest.get(2..2 + extended) else { break None };
        let length = length.iter().fold(0_u64, |length, byte| length << 8 | u64::from(*byte));
        let length = if extended == 0 { u64::from(second & 0x7f) } else { length };
        if length > limits.binary_bytes {
            break Some(Violation::TooBig);
        }
        let head = 2 + extended + 4;
        let Some(frame) = rest.get(..head + usize::try_from(length).expect("2 MiB at most")) else { break None };
        let alone = message.is_none();
        let broken = match (opcode, &mut message) {
            (8..=10, _) if !fin => Some(Violation::Protocol("a control frame in fragments")),
            (8..=10, _) if length > 125 => Some(Violation::Protocol("a control frame over 125 bytes")),
            (8..=10, _) => None,
            (0, None) => Some(Violation::Protocol("a continuation of nothing")),
            (1 | 2, Some(_)) => Some(Violation::Protocol("a message inside another")),
            (0..=2, open) => {
                let limit = if opcode == 1 { limits.text_bytes } else { limits.binary_bytes };
                let (bytes, limit, fragments) = open.get_or_insert((0, limit, 0));
                (*bytes, *fragments) = (*bytes + length, *fragments + 1);
                match () {
                    () if *bytes > *limit => Some(Violation::TooBig),
                    () if *fragments > limits.fragments => Some(Violation::Protocol("too many fragments")),
                    () if !fin && length == 0 => Some(Violation::Protocol("an empty fragment")),
                    () => None,
                }
            }
            _ => Some(Violation::Protocol("an unknown opcode")),
        };
        if broken.is_some() {
            break broken;
        }
        if fin && opcode < 8 {
            message = None;
        }
        at += frame.len();
        if collecting && fin && opcode == 2 && alone {
            let (mask, payload) = frame.split_at(head - 4).1.split_at(4);
            let audio: Vec<u8> = payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
            if !audio.is_empty() {
                add(&mut passed, Passed::Audio(audio));
            }
        } else if frame != EMPTY_PONG {
            add(&mut passed, Passed::Frames(frame.to_vec()));
        }
    };
    (passed, broken)
}

/// A query string: what is taken from it is within its bounds.
pub fn ingest_query(data: &[u8]) {
    let Ok(query) = IngestQuery::parse(&String::from_utf8_lossy(data)) else { return };
    let names = [
        Some(query.room.as_str()),
        query.participant.as_ref().map(|name| name.as_str()),
        query.track.as_ref().map(|name| name.as_str()),
        query.meeting.as_ref().map(|name| name.as_str()),
    ];
    assert!(names.into_iter().flatten().all(|name| (1..=1_024).contains(&name.len())), "{query:?}");
    assert!(query.sample_rate.is_none_or(|rate| (8_000..=192_000).contains(&rate)), "{query:?}");
    assert!(query.channels.is_none_or(|channels| (1..=2).contains(&channels)), "{query:?}");
    assert!(query.group_seconds.is_none_or(|seconds| (0.1..=30.0).contains(&seconds)), "{query:?}");
    let format = query.format(None);
    assert!(format.byte_rate() > 0, "{query:?}");
}

/// A text message: nothing but `muted` with true or false says that something is muted or not.
pub fn text_frame(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let said = serde_json::from_str::<serde_json::Value>(&text).ok();
    let muted = said.as_ref().and_then(|value| value.get("muted")).and_then(serde_json::Value::as_bool);
    match parse_text(&text) {
        // An array of one value is read as a structure too, and what is beside it need not be read, which harms nobody.
        TextMessage::Muted(told) => assert!(muted == Some(told) || said.is_none_or(|value| value.is_array()), "{text}"),
        // Said twice, in clear or by escapes, it is not understood.
        TextMessage::Unknown => assert!(muted.is_none() || text.matches("muted").count() > 1 || text.contains('\\'), "{text}"),
    }
}

/// A file that a crash left behind; a first byte below 128 puts one of our own headers in front of the rest, which declares the next four bytes.
/// Either the file is left as it is, or it is whole, and holds nothing but what it held.
pub fn wav_repair(data: &[u8]) {
    let content = match data {
        [kind @ ..128, rest @ ..] if rest.len() >= 4 => {
            let format = PcmFormat { sample_rate: 8_000 + u32::from(*kind) * 1_000, channels: 1 + u16::from(kind & 1) };
            let (declared, audio) = rest.split_at(4);
            let declared = declared.iter().fold(0_u64, |bytes, byte| bytes << 8 | u64::from(*byte));
            [&wav_header::encode(format, declared.min(wav_header::MAX_DATA_BYTES))[..], audio].concat()
        }
        _ => data.to_vec(),
    };
    static FILES: AtomicU64 = AtomicU64::new(0);
    let path = std::env::temp_dir().join(format!("live-meeting-{}-{}.wav", std::process::id(), FILES.fetch_add(1, Relaxed)));
    std::fs::write(&path, &content).expect("written");
    let read = |path: &Path| std::fs::read(path).expect("the file is still there");
    let repaired = || repair(&Interrupted::file(path.clone()));
    match repaired() {
        Ok(Outcome::Recovered(_)) => {}
        Ok(Outcome::Bad(aside)) => {
            assert!(content.len() < 44 && read(&aside) == content, "what is too short is kept under another name");
            return std::fs::remove_file(&aside).expect("removed");
        }
        Ok(other) => panic!("{other:?}"),
        Err(_) => {
            assert_eq!(read(&path), content, "what is not ours is left alone");
            return std::fs::remove_file(&path).expect("removed");
        }
    }
    let after = read(&path);
    let (header, audio) = after.split_first_chunk::<44>().expect("a header");
    let (format, declared) = wav_header::declared(header).expect("a header of ours");
    let held = content.get(44..).expect("only what has a header is repaired");
    assert!(held.starts_with(audio) && held.len() - audio.len() < 4, "{} of {} bytes are kept", audio.len(), held.len());
    assert_eq!((Some(declared), declared % format.frame_bytes()), (u64::try_from(after.len()).ok().map(|bytes| bytes - HEADER_BYTES), 0));
    assert!(matches!(repaired(), Ok(Outcome::Sealed(_))), "it is done once");
    assert_eq!(read(&path), after);
    for file in [sidecar::path_of(&path), path] {
        std::fs::remove_file(file).expect("removed");
    }
}

/// Names that strangers chose, cut apart at bytes 255: whatever they are, they name one file in one directory below the audio directory.
pub fn path_components(data: &[u8]) {
    let texts: Vec<String> = data.split(|byte| *byte == 255).map(|text| String::from_utf8_lossy(text).into_owned()).collect();
    for text in &texts {
        let part = safe_part(Some(text));
        assert!((1..=48).contains(&part.len()) && !part.starts_with('.'), "{text:?} becomes {part:?}");
        assert!(part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)), "{text:?} becomes {part:?}");
    }
    let mut names = texts.into_iter();
    let (Some(meeting), Some(room)) = (names.next(), names.next()) else { return };
    let name = SegmentName { meeting, room, participant: names.next(), track: names.next() };
    let file = name.file(DateTime::UNIX_EPOCH);
    assert!(file.components().count() == 2 && file.components().all(|part| matches!(part, Component::Normal(_))), "{}", file.display());
    assert!(file.file_name().is_some_and(|name| name.len() <= 255), "{}", file.display());
    let root = Path::new("/audio");
    assert_eq!(below(root, &file.to_string_lossy()), Some(root.join(&file)), "what is stored is found");
    assert!(
        names
            .next()
            .and_then(|path| below(root, &path))
            .is_none_or(|path| path.starts_with(root) && !path.components().any(|part| part == Component::ParentDir))
    );
}

/// A webhook: what nobody has signed is not believed, nor is anything that was signed and then changed; whatever is believed can be read.
/// A zero byte parts the changes to a good token, each a place and what is laid over it, from the body.
pub fn webhook(data: &[u8]) {
    const KEY: &str = "key";
    const SECRET: &str = "a-secret-of-thirty-two-characters";
    let verifier = WebhookVerifier::new([(KEY, SECRET)]);
    let at = data.iter().position(|byte| *byte == 0).unwrap_or(data.len());
    let (changes, body) = data.split_at(at);
    let good = sign(KEY, SECRET, body).expect("signed");
    assert_eq!(verifier.verify(Some(&good), body), Ok(()));
    let mut token = good.clone().into_bytes();
    for change in changes.chunks_exact(3) {
        let [high, low, mask] = *change else { continue };
        let place = usize::from(u16::from_be_bytes([high, low])) % token.len();
        if let Some(byte) = token.get_mut(place) {
            *byte ^= mask & 0x7f;
        }
    }
    let token = String::from_utf8_lossy(&token).into_owned();
    // Blanks around a token are no part of it.
    assert!(token.trim() == good || verifier.verify(Some(&token), body).is_err(), "{token}");
    assert!(verifier.verify(Some(&good), &[body, b"x"].concat()).is_err());
    assert!(verifier.verify(Some(&String::from_utf8_lossy(data)), body).is_err());
    let read = parse(body, SystemTime::UNIX_EPOCH);
    assert!(!read.event.id.as_str().is_empty() && !read.event.name.is_empty(), "{read:?}");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Target = fn(&[u8]);

    /// By their names.
    const TARGETS: [(&str, Target); 6] = [
        ("ws_guard", ws_guard),
        ("ingest_query", ingest_query),
        ("text_frame", text_frame),
        ("wav_repair", wav_repair),
        ("path_components", path_components),
        ("webhook", webhook),
    ];

    #[test]
    fn every_input_that_was_kept_passes_and_every_target_has_some() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
        for (name, target) in TARGETS {
            assert!(root.join(format!("fuzz_targets/{name}.rs")).is_file(), "{name} can be fuzzed");
            let corpus = std::fs::read_dir(root.join("corpus").join(name)).expect("a corpus");
            let inputs: Vec<_> = corpus.map(|entry| std::fs::read(entry.expect("an entry").path()).expect("an input")).collect();
            assert!(inputs.len() >= 3, "{name} has {} inputs", inputs.len());
            inputs.iter().for_each(|input| target(input));
        }
    }

    /// Frames with lengths about the bounds, of any kind, some of them cut off.
    fn frames() -> impl Strategy<Value = Vec<u8>> {
        let length = prop_oneof![0..200_usize, Just(4_095), Just(4_097), Just(60_000), Just(65_536), Just(65_537)];
        // Most often whole binary messages, as audio is.
        let kind = prop_oneof![1 => Just(0), 1 => Just(1), 8 => Just(2), 3 => 8..11_u8, 1 => any::<u8>()];
        let frame = (proptest::bool::weighted(0.85), kind, length, any::<[u8; 4]>()).prop_map(|(fin, opcode, length, mask)| {
            let mut frame = vec![u8::from(fin) << 7 | opcode];
            match length {
                0..126 => frame.push(0x80 | length as u8),
                126..65_536 => {
                    frame.push(0x80 | 126);
                    frame.extend((length as u16).to_be_bytes());
                }
                _ => {
                    frame.push(0x80 | 127);
                    frame.extend((length as u64).to_be_bytes());
                }
            }
            frame.extend(mask);
            frame.extend((0..length).map(|at| (at * 31 % 251) as u8));
            frame
        });
        (any::<u8>(), proptest::collection::vec(frame, 0..20), 0..10_usize).prop_map(|(piece, frames, cut)| {
            let mut wire = frames.concat();
            wire.truncate(wire.len().saturating_sub(cut));
            wire.insert(0, piece);
            wire
        })
    }

    /// Parameters that are known, with values of all kinds.
    fn query() -> impl Strategy<Value = String> {
        let name = prop_oneof![
            Just("roomName"),
            Just("room"),
            Just("participant"),
            Just("trackId"),
            Just("meetingId"),
            Just("sampleRate"),
            Just("channels"),
            Just("groupSeconds"),
            Just("analyse"),
            Just("mix")
        ];
        let value = prop_oneof!["[0-9.eE+-]{0,8}", "[a-z%0-9]{0,20}", ".{0,40}"];
        proptest::collection::vec((name, value), 0..8).prop_map(|pairs| pairs.into_iter().map(|(name, value)| format!("{name}={value}&")).collect())
    }

    proptest! {
        #[test]
        fn any_bytes_pass_every_target(data in proptest::collection::vec(any::<u8>(), 0..600)) {
            for (_, target) in TARGETS {
                target(&data);
            }
        }

        #[test]
        fn i2_the_guard_lets_whole_frames_through_that_break_no_rule_however_they_are_cut(wire in frames()) {
            ws_guard(&wire);
        }

        #[test]
        fn what_is_taken_from_a_query_is_within_its_bounds(text in query()) {
            ingest_query(text.as_bytes());
        }

        #[test]
        fn nothing_else_is_taken_for_a_mute_text(text in r#"\{?"?(muted|x)?"?:?(true|false|1|null|\{\}|"true")?,?"?(muted)?"?\}?"#) {
            text_frame(text.as_bytes());
        }

        #[test]
        fn d4_any_file_is_left_alone_or_whole_afterwards(kind in 0..128_u8, declared: [u8; 4], audio in proptest::collection::vec(any::<u8>(), 0..300)) {
            wav_repair(&[&[kind][..], &declared, &audio].concat());
        }
    }
}
