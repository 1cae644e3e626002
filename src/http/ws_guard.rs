//! Bounded inbound framing in front of actix-web-actors.
//!
//! actix-web-actors has no inbound backpressure and judges a frame's size only once it is whole (`docs/FACTS.md`, F1): one connection could take
//! gigabytes. This stream reads the frame header itself, refuses what is too large or wrong there and then, hands over one frame at a time, and
//! reads no faster than the sender may speak. What it does not read stays in TCP.

mod frame;
mod pace;

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use actix_web::error::PayloadError;
use bytes::Bytes;
use futures_util::Stream;
use tokio::time::{Instant, Sleep};

use self::frame::{BINARY, CLOSE, CONTINUATION, Front, Header, PING, PONG, TEXT, Unread};
use self::pace::Bucket;
use super::intake::Intake;

/// How a sender broke the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Violation {
    /// Closes with 1009.
    TooBig,
    /// Closes with 1002.
    Protocol(&'static str),
}

/// What a sender may do.
#[derive(Debug, Clone, Copy)]
pub struct GuardLimits {
    /// Of one binary message, also in fragments.
    pub binary_bytes: u64,
    /// Of one text message.
    pub text_bytes: u64,
    /// Fragments of one message; gorilla cuts at 4,096 bytes.
    pub fragments: u32,
    /// Time from a message's first fragment to its last.
    pub message_time: Duration,
    /// Payload bytes and frames per second that are read, after a burst.
    pub bytes_per_second: f64,
    pub frames_per_second: f64,
    pub burst_bytes: f64,
    pub burst_frames: f64,
}

/// The stream. Ends with an error after a violation, which it leaves in `violation`, and without one when the connection ends or breaks.
pub struct WsGuard<S> {
    inner: S,
    limits: GuardLimits,
    violation: Rc<Cell<Option<Violation>>>,
    /// Takes the audio of whole binary messages; without one they go the way of all frames.
    intake: Option<Rc<Intake>>,
    unread: Unread,
    /// Bytes that came since `inner` had nothing more.
    at_once: usize,
    message: Option<OpenMessage>,
    bytes: Bucket,
    frames: Bucket,
    pause: Option<Pin<Box<Sleep>>>,
    /// A frame was just handed over: the reader gets to look at it before the next.
    handed_over: bool,
    ended: bool,
}

/// A message of which a fragment has come, but not the last.
struct OpenMessage {
    bytes: u64,
    limit: u64,
    fragments: u32,
    deadline: Instant,
}

/// The longest payload of a control frame (RFC 6455 5.5).
const CONTROL_BYTES: u64 = 125;

impl<S> WsGuard<S> {
    pub fn new(inner: S, limits: GuardLimits, violation: Rc<Cell<Option<Violation>>>) -> Self {
        let now = Instant::now();
        Self {
            inner,
            violation,
            intake: None,
            unread: Unread::default(),
            at_once: 0,
            message: None,
            bytes: Bucket { rate: limits.bytes_per_second, size: limits.burst_bytes, level: limits.burst_bytes, at: now },
            frames: Bucket { rate: limits.frames_per_second, size: limits.burst_frames, level: limits.burst_frames, at: now },
            limits,
            pause: None,
            handed_over: false,
            ended: false,
        }
    }

    /// Collects the audio of whole binary messages in `intake`, and hands over a pong when there is a batch to take. Whoever is handed another
    /// frame takes what has been collected first.
    pub fn collecting_in(mut self, intake: Rc<Intake>) -> Self {
        self.intake = Some(intake);
        self
    }

    /// Judges a frame by its header, in the light of the message it belongs to.
    fn judge(&mut self, header: Header, now: Instant) -> Result<(), Violation> {
        let Header { fin, opcode, payload_bytes, .. } = header;
        // Any frame tells, also a ping that keeps the connection alive.
        if self.message.as_ref().is_some_and(|message| now > message.deadline) {
            return Err(Violation::Protocol("a message that takes too long"));
        }
        let limit = match opcode {
            CLOSE | PING | PONG if !fin => return Err(Violation::Protocol("a control frame in fragments")),
            CLOSE | PING | PONG if payload_bytes > CONTROL_BYTES => return Err(Violation::Protocol("a control frame over 125 bytes")),
            CLOSE | PING | PONG => return Ok(()),
            CONTINUATION if self.message.is_none() => return Err(Violation::Protocol("a continuation of nothing")),
            TEXT | BINARY if self.message.is_some() => return Err(Violation::Protocol("a message inside another")),
            CONTINUATION => 0,
            TEXT => self.limits.text_bytes,
            BINARY => self.limits.binary_bytes,
            _ => return Err(Violation::Protocol("an unknown opcode")),
        };
        let message_time = self.limits.message_time;
        let message = self.message.get_or_insert(OpenMessage { bytes: 0, limit, fragments: 0, deadline: now + message_time });
        message.bytes = message.bytes.saturating_add(payload_bytes);
        message.fragments += 1;
        if message.bytes > message.limit {
            return Err(Violation::TooBig);
        }
        if message.fragments > self.limits.fragments {
            return Err(Violation::Protocol("too many fragments"));
        }
        if !fin && payload_bytes == 0 {
            return Err(Violation::Protocol("an empty fragment"));
        }
        if fin {
            self.message = None;
        }
        Ok(())
    }

    fn violate(&mut self, violation: Violation) -> Poll<Option<Result<Bytes, PayloadError>>> {
        self.violation.set(Some(violation));
        self.ended = true;
        self.unread.clear();
        Poll::Ready(Some(Err(PayloadError::Overflow)))
    }

    /// Whether the sender's pace allows this frame now; else when.
    fn pace(&mut self, header: Header, now: Instant) -> Result<(), Instant> {
        #[expect(clippy::as_conversions, reason = "at most 2 MiB: exact in an f64")]
        let bytes = header.payload_bytes as f64;
        let wait = self.bytes.wait_for(bytes, now).max(self.frames.wait_for(1.0, now));
        if wait.is_zero() {
            self.bytes.level -= bytes;
            self.frames.level -= 1.0;
            return Ok(());
        }
        Err(now + wait)
    }
}

/// A pong, which may come between the fragments of a message too.
const BATCH_IS_THERE: &[u8] = &[0x8a, 0x80, 0, 0, 0, 0];

impl<S: Stream<Item = Result<Bytes, PayloadError>> + Unpin> WsGuard<S> {
    /// Takes every frame that is there, up to one that the actor must see; `None` when more bytes are needed or the sender has to wait.
    fn take_frames(&mut self, cx: &mut Context<'_>) -> Option<Result<Bytes, Violation>> {
        loop {
            if let Some(pause) = &mut self.pause {
                if pause.as_mut().poll(cx).is_pending() {
                    return None;
                }
                self.pause = None;
            }
            let header = match self.unread.front() {
                Err(problem) => return Some(Err(Violation::Protocol(problem))),
                Ok(Front::Whole(header)) => header,
                // Sizes are judged before the payload is waited for.
                Ok(Front::Partial(Some(header))) if self.is_too_big(header) => return Some(Err(Violation::TooBig)),
                Ok(Front::Partial(_)) => {
                    self.unread.keep_cut();
                    return None;
                }
            };
            if self.is_too_big(header) {
                return Some(Err(Violation::TooBig));
            }
            let into = self.intake.clone().filter(|_| header.fin && header.opcode == BINARY && self.message.is_none());
            if into.as_ref().is_some_and(|intake| intake.is_full()) {
                return Some(Ok(Bytes::from_static(BATCH_IS_THERE)));
            }
            let now = Instant::now();
            if let Err(ready_at) = self.pace(header, now) {
                self.pause = Some(Box::pin(tokio::time::sleep_until(ready_at)));
                continue;
            }
            if let Err(violation) = self.judge(header, now) {
                return Some(Err(violation));
            }
            match into {
                Some(intake) => {
                    let ahead = self.unread.bytes();
                    self.unread.consume(header, |payload, mask| intake.push(payload, mask, ahead));
                }
                None => return Some(Ok(self.unread.take(header))),
            }
        }
    }

    fn is_too_big(&self, header: Header) -> bool {
        header.payload_bytes > self.limits.binary_bytes.max(self.limits.text_bytes)
    }

    /// Nothing more can be taken now: says so if there is a batch that is whole or has waited for long enough.
    fn due_batch(&self, cx: &mut Context<'_>) -> Option<Bytes> {
        let intake = self.intake.as_ref()?;
        intake.wake_later(cx.waker());
        (intake.is_full() || intake.is_due()).then(|| Bytes::from_static(BATCH_IS_THERE))
    }
}

impl<S: Stream<Item = Result<Bytes, PayloadError>> + Unpin> Stream for WsGuard<S> {
    type Item = Result<Bytes, PayloadError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if std::mem::take(&mut this.handed_over) {
            // actix-web-actors collects until there is nothing more for now, and only then decodes.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        loop {
            if this.ended {
                return Poll::Ready(None);
            }
            let frame = match this.take_frames(cx) {
                Some(Ok(frame)) => Some(frame),
                Some(Err(violation)) => return this.violate(violation),
                None if this.pause.is_some() => this.due_batch(cx),
                None => match Pin::new(&mut this.inner).poll_next(cx) {
                    Poll::Pending => {
                        let before = std::mem::take(&mut this.at_once);
                        match this.intake.as_ref().and_then(|intake| intake.read_past(before)) {
                            Some(bytes) => {
                                this.unread.add_alone(bytes);
                                continue;
                            }
                            None => this.due_batch(cx),
                        }
                    }
                    Poll::Ready(Some(Ok(chunk))) => {
                        this.at_once += chunk.len();
                        if let Some(intake) = &this.intake {
                            intake.note_read();
                        }
                        this.unread.add(chunk);
                        continue;
                    }
                    // A lost connection breaks no rule. Behind this stream the two could not be told apart: both would be I/O errors.
                    Poll::Ready(Some(Err(_)) | None) => {
                        this.ended = true;
                        return Poll::Ready(None);
                    }
                },
            };
            return match frame {
                Some(frame) => {
                    this.handed_over = true;
                    Poll::Ready(Some(Ok(frame)))
                }
                None => Poll::Pending,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, StreamExt, stream};

    use super::*;
    use crate::audio::format::PcmFormat;
    use crate::http::egress_socket::guard_limits;

    fn limits() -> GuardLimits {
        guard_limits(PcmFormat::LIVEKIT, true, 8.0)
    }

    fn frame(fin: bool, opcode: u8, payload: usize) -> Vec<u8> {
        let mut frame = vec![u8::from(fin) << 7 | opcode];
        match payload {
            0..126 => frame.push(0x80 | payload as u8),
            126..65_536 => {
                frame.push(0x80 | 126);
                frame.extend((payload as u16).to_be_bytes());
            }
            _ => {
                frame.push(0x80 | 127);
                frame.extend((payload as u64).to_be_bytes());
            }
        }
        frame.extend([1, 2, 3, 4]);
        frame.resize(frame.len() + payload, 7);
        frame
    }

    /// The frames that come through, and how it ends.
    async fn guarded(pieces: Vec<Vec<u8>>) -> (Vec<Bytes>, Option<Violation>) {
        let violation = Rc::new(Cell::new(None));
        let inner = stream::iter(pieces.into_iter().map(|piece| Ok(Bytes::from(piece))));
        let mut guard = WsGuard::new(inner, limits(), Rc::clone(&violation));
        let mut frames = Vec::new();
        while let Some(Ok(frame)) = guard.next().await {
            frames.push(frame);
        }
        (frames, violation.get())
    }

    #[actix_rt::test]
    async fn frames_come_one_by_one_however_they_were_cut() {
        let frames = [frame(true, BINARY, 1_920), frame(true, TEXT, 14), frame(true, PING, 4), frame(true, BINARY, 0)];
        let stream = frames.concat();
        for size in [1, 7, 100, 5_000] {
            let pieces = stream.chunks(size).map(<[u8]>::to_vec).collect();
            let (seen, violation) = guarded(pieces).await;
            assert_eq!(seen, frames, "in pieces of {size}");
            assert_eq!(violation, None);
        }
    }

    #[actix_rt::test]
    async fn a_reader_is_given_one_frame_before_the_next() {
        let inner = stream::iter([Ok(Bytes::from([frame(true, BINARY, 4), frame(true, BINARY, 4)].concat()))]);
        let mut guard = WsGuard::new(inner, limits(), Rc::default());
        assert!(guard.next().now_or_never().is_some());
        assert!(guard.next().now_or_never().is_none());
        assert!(guard.next().now_or_never().is_some());
    }

    #[actix_rt::test]
    async fn violations_by_kind() {
        let mut huge = vec![0x82, 0xff];
        huge.extend((8u64 << 30).to_be_bytes());
        huge.extend([0; 4]);
        let fragments = |count: usize| [vec![frame(false, BINARY, 10)], vec![frame(false, CONTINUATION, 10); count]].concat().concat();
        let cases: [(&str, Vec<u8>, Violation); 13] = [
            ("an 8 GiB frame, by its header", huge, Violation::TooBig),
            ("64 KiB and one byte", frame(true, BINARY, 65_537), Violation::TooBig),
            ("a text over 4 KiB", frame(true, TEXT, 4_097), Violation::TooBig),
            ("a message over its cap", [frame(false, BINARY, 60_000), frame(true, CONTINUATION, 6_000)].concat(), Violation::TooBig),
            ("65 fragments", fragments(64), Violation::Protocol("too many fragments")),
            ("empty continuations", [frame(false, BINARY, 1), frame(false, CONTINUATION, 0)].concat(), Violation::Protocol("an empty fragment")),
            ("continuation of nothing", frame(true, CONTINUATION, 5), Violation::Protocol("a continuation of nothing")),
            ("a message inside another", [frame(false, BINARY, 5), frame(true, TEXT, 5)].concat(), Violation::Protocol("a message inside another")),
            ("a ping in fragments", frame(false, PING, 5), Violation::Protocol("a control frame in fragments")),
            ("a long ping", frame(true, PING, 126), Violation::Protocol("a control frame over 125 bytes")),
            ("an unknown opcode", frame(true, 3, 5), Violation::Protocol("an unknown opcode")),
            ("reserved bits", vec![0xc2, 0x80, 0, 0, 0, 0], Violation::Protocol("reserved bits")),
            ("an unmasked frame", vec![0x82, 0x01, 0], Violation::Protocol("an unmasked frame")),
        ];
        for (case, bytes, expected) in cases {
            assert_eq!(guarded(vec![bytes]).await.1, Some(expected), "{case}");
        }
    }

    #[actix_rt::test]
    async fn fragments_and_control_frames_between_them_are_fine() {
        let frames = [frame(false, BINARY, 4_096), frame(true, PING, 4), frame(true, CONTINUATION, 904), frame(true, CLOSE, 0)];
        assert_eq!(guarded(vec![frames.concat()]).await, (frames.iter().map(|frame| Bytes::from(frame.clone())).collect(), None));
    }

    #[actix_rt::test]
    async fn a_message_must_be_whole_in_time_whatever_comes_between() {
        tokio::time::pause();
        let violation = Rc::new(Cell::new(None));
        let pieces = stream::iter([frame(false, BINARY, 10), frame(true, PING, 4)]).then(async |piece| {
            tokio::time::sleep(Duration::from_secs(4)).await;
            Ok(Bytes::from(piece))
        });
        let late = stream::once(async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            Ok(Bytes::from(frame(true, PING, 4)))
        });
        let mut guard = WsGuard::new(Box::pin(pieces.chain(late)), limits(), Rc::clone(&violation));
        let mut frames = 0;
        while let Some(Ok(_)) = guard.next().await {
            frames += 1;
        }
        assert_eq!((frames, violation.get()), (2, Some(Violation::Protocol("a message that takes too long"))));
    }

    #[actix_rt::test]
    async fn after_a_burst_of_ten_seconds_the_pace_is_eight_times_real_time() {
        tokio::time::pause();
        let minute = vec![frame(true, BINARY, 1_920); 6_000].concat();
        let inner = stream::iter([Ok(Bytes::from(minute))]);
        let mut guard = WsGuard::new(inner, limits(), Rc::default());
        let start = Instant::now();
        let mut frames = 0;
        while guard.next().await.is_some() {
            frames += 1;
        }
        assert_eq!(frames, 6_000);
        // 50 s behind the burst at eight times the speed.
        let took = start.elapsed().as_secs_f64();
        assert!((6.0..6.6).contains(&took), "{took} s");
    }

    #[actix_rt::test]
    async fn tiny_frames_are_paced_by_their_number() {
        tokio::time::pause();
        let inner = stream::iter([Ok(Bytes::from(vec![frame(true, BINARY, 1); 2_600].concat()))]);
        let mut guard = WsGuard::new(inner, limits(), Rc::default());
        let start = Instant::now();
        while guard.next().await.is_some() {}
        let took = start.elapsed().as_secs_f64();
        assert!((1.9..2.3).contains(&took), "{took} s");
    }

    /// A guard that collects, and what it was given; the frames that an adapter would see, with the audio that it takes at each pong.
    async fn collected(pieces: Vec<Vec<u8>>) -> (Vec<u8>, Vec<Bytes>) {
        let stats = std::sync::Arc::new(crate::actors::stats::TrackStats::new(PcmFormat::LIVEKIT, std::sync::Arc::default()));
        let intake = Intake::new(PcmFormat::LIVEKIT, stats, crate::clock::Clock::start(), None);
        let inner = stream::iter(pieces.into_iter().map(|piece| Ok(Bytes::from(piece))));
        let mut guard = WsGuard::new(inner, limits(), Rc::default()).collecting_in(Rc::clone(&intake));
        let (mut audio, mut frames) = (Vec::new(), Vec::new());
        while let Some(Ok(frame)) = guard.next().await {
            if frame != BATCH_IS_THERE {
                frames.push(frame);
            }
            audio.extend(intake.take().map(|batch| batch.audio).unwrap_or_default());
        }
        audio.extend(intake.take().map(|batch| batch.audio).unwrap_or_default());
        (audio, frames)
    }

    #[actix_rt::test]
    async fn audio_is_collected_however_it_was_cut_and_everything_else_handed_over() {
        let plain: Vec<u8> = (0..40 * 1_920).map(|at| (at * 31 % 251) as u8).collect();
        let mask = [1, 2, 3, 4];
        let masked = |part: &[u8]| -> Vec<u8> {
            let payload = part.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask);
            frame(true, BINARY, part.len())[..8].iter().copied().chain(payload).collect()
        };
        let others = [frame(true, TEXT, 14), frame(false, BINARY, 700), frame(true, PING, 4), frame(true, CONTINUATION, 90), frame(true, CLOSE, 0)];
        let (early, late) = plain.split_at(17 * 1_920);
        let whole = [
            early.chunks(1_920).map(masked).collect::<Vec<_>>().concat(),
            others[..4].concat(),
            late.chunks(1_920).map(masked).collect::<Vec<_>>().concat(),
            others[4].clone(),
        ]
        .concat();
        for size in [1, 7, 1_000, 1_928, 30_000, whole.len()] {
            let (audio, frames) = collected(whole.chunks(size).map(<[u8]>::to_vec).collect()).await;
            assert!(audio == plain, "in pieces of {size}: {} bytes", audio.len());
            assert_eq!(frames, others, "in pieces of {size}");
        }
    }
}
