//! Where the audio of one socket is collected, a batch at a time, before its actor hears of it.
//!
//! [`WsGuard`](super::ws_guard::WsGuard) unmasks LiveKit's messages right into it and wakes the actor when a batch is whole. One pulse per worker, which
//! costs less than a timer per socket, says when a stream that flows is to be read, and looks after batches that do not fill up.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};

use super::low_water::LowWater;
use crate::actors::read_stalls::ReadStalls;
use crate::actors::stats::TrackStats;
use crate::actors::track::AudioArrived;
use crate::audio::format::PcmFormat;
use crate::clock::Clock;

/// The audio of one batch: with the write behind it, what came is in the file 250 ms later at the latest.
pub const BATCH: Duration = Duration::from_millis(150);
/// How old the oldest byte of a batch may grow before it goes as it is.
const PATIENCE: Duration = Duration::from_millis(160);
/// How long after its last read a stream that flows is read again: with a pulse in between, a batch later.
const FLOW: Duration = Duration::from_millis(140);
/// More than this in one go is no message that came at its time: the sender, or this thread, is behind.
const AT_ONCE_BYTES: usize = 8 * 1024;
/// A batch that took longer does not flow.
const PAUSE: Duration = Duration::from_millis(175);
/// How long nothing may be read of a stream that flows: then whoever was to look at it cannot, and actix-http reads.
const UNSEEN: Duration = Duration::from_millis(300);
/// How often batches and pauses are looked at.
const PULSE: Duration = Duration::from_millis(20);
/// What a WebSocket message of up to 64 KiB has in front of its payload.
const FRAME_HEADER_BYTES: u64 = 8;
/// LiveKit's messages (`docs/FACTS.md`, egress socket).
const MESSAGE: Duration = Duration::from_millis(10);

pub struct Intake {
    batch_bytes: usize,
    audio: RefCell<BytesMut>,
    /// When the first byte of `audio` came.
    since: Cell<Option<Instant>>,
    last_read: Cell<Instant>,
    /// When the oldest byte of the last read came, at the earliest.
    arriving: Cell<Instant>,
    /// The mark has held bytes back since the last read.
    held_back: Cell<bool>,
    /// It flows, nothing has come since its last read, and it is time for the next.
    looks: Cell<bool>,
    /// What the last look at a stream that flows has read is a batch, however much it is.
    is_whole: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    low_water: Option<LowWater>,
    clock: Clock,
    stats: Arc<TrackStats>,
}

impl Intake {
    /// Is looked after by this thread's pulse for as long as it lives.
    pub fn new(format: PcmFormat, stats: Arc<TrackStats>, clock: Clock, socket: Option<std::os::fd::OwnedFd>) -> Rc<Self> {
        let intake = Rc::new(Self::alone(format, stats, clock, socket));
        pulse::look_after(&intake);
        intake
    }

    /// Is looked after by nobody: a batch that does not fill up waits for the next look at it.
    pub(crate) fn alone(format: PcmFormat, stats: Arc<TrackStats>, clock: Clock, socket: Option<std::os::fd::OwnedFd>) -> Self {
        let batch_bytes = usize::try_from(format.bytes_in(BATCH)).unwrap_or(usize::MAX).max(4);
        let messages = u64::try_from(BATCH.as_millis() / MESSAGE.as_millis()).unwrap_or(1);
        let mark = batch_bytes.saturating_add(usize::try_from(messages * FRAME_HEADER_BYTES).unwrap_or(0));
        let now = Instant::now();
        Self {
            batch_bytes,
            audio: RefCell::default(),
            since: Cell::new(None),
            last_read: Cell::new(now),
            arriving: Cell::new(now),
            held_back: Cell::new(false),
            looks: Cell::new(false),
            is_whole: Cell::new(false),
            waker: RefCell::default(),
            low_water: socket.map(|socket| LowWater::new(socket, 2 * mark)),
            clock,
            stats,
        }
    }

    /// Something was read from the socket.
    pub(super) fn note_read(&self) {
        self.looks.set(false);
        self.is_whole.set(false);
        let now = Instant::now();
        let last_read = self.last_read.replace(now);
        self.arriving.set(if self.held_back.replace(self.is_raised()) { last_read } else { now });
        self.stats.note_arrival();
    }

    /// Takes audio in, masked as it came: `mask` begins with the byte for the payload's first. So many bytes, `ahead`, are there to come, with these.
    pub(super) fn push(&self, payload: &[u8], mask: [u8; 4], ahead: usize) {
        if payload.is_empty() {
            return;
        }
        self.stats.note_audio();
        let mut audio = self.audio.borrow_mut();
        if self.since.get().is_none() {
            self.since.set(Some(self.arriving.get()));
        }
        // Room for what is there and no more: most of the time a socket waits, and thousands of them would hold it empty.
        let room = ahead.min(self.most_bytes().saturating_sub(audio.len())).max(payload.len());
        audio.reserve(room);
        unmask_into(&mut audio, payload, mask);
    }

    /// From how many bytes on a batch is whole.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn batch_bytes(&self) -> usize {
        self.batch_bytes
    }

    /// Whether a batch is whole.
    pub(super) fn is_full(&self) -> bool {
        self.audio.borrow().len() >= self.most_bytes()
    }

    /// What one look at a stream that flows has read is not cut.
    fn most_bytes(&self) -> usize {
        if self.is_raised() { 2 * self.batch_bytes } else { self.batch_bytes }
    }

    /// Reads a stream that flows past actix-http, when the pulse has said so: its read buffer, which holds what was read until it reads again, would hold
    /// a batch of each track. Asked when actix-http has nothing more; `before` is what it has handed over since it last had nothing.
    ///
    /// Contract: actix-http holds no bytes, which would come before these. It takes a poll of its own to read, decode and hand over, in this order, and
    /// leaves out the two last steps only while 32 KiB wait to be taken (its `h1::payload`). The pulse is another task of the thread, so the poll that
    /// asks here began after it; had anything waited then, or been read in it, it had been taken by now, and the pulse's word with it.
    pub(super) fn read_past(&self, before: usize) -> Option<Bytes> {
        let low_water = self.low_water.as_ref().filter(|low_water| low_water.is_raised())?;
        if before > AT_ONCE_BYTES {
            // Else its read buffer would stay as large as that.
            low_water.lower();
            return None;
        }
        if !self.looks.take() {
            return None;
        }
        match low_water.read() {
            Ok(bytes) if !bytes.is_empty() => {
                self.note_read();
                self.is_whole.set(true);
                Some(bytes)
            }
            // It has paused, or ended, which actix-http finds out.
            Ok(_) | Err(_) => {
                low_water.lower();
                self.held_back.set(false);
                None
            }
        }
    }

    /// Whether there is a batch that has waited for long enough.
    pub(super) fn is_due(&self) -> bool {
        self.since.get().is_some_and(|since| self.is_whole.get() || since.elapsed() >= PATIENCE)
    }

    /// Remembers whom the pulse is to wake.
    pub(super) fn wake_later(&self, waker: &Waker) {
        let mut kept = self.waker.borrow_mut();
        if !kept.as_ref().is_some_and(|kept| kept.will_wake(waker)) {
            *kept = Some(waker.clone());
        }
    }

    /// What has been collected.
    pub fn take(&self) -> Option<AudioArrived> {
        let arrived = self.since.take()?;
        let audio: Bytes = self.audio.take().freeze();
        if audio.len() >= self.batch_bytes && arrived.elapsed() < PAUSE {
            // It flows: the next batch is read in one go. If nobody does in time, actix-http does, from two batches on.
            if let Some(low_water) = &self.low_water {
                low_water.raise();
                self.held_back.set(true);
            }
        }
        Some(AudioArrived { audio, arrived, read: self.last_read.get(), arrived_at: self.clock.at(arrived) })
    }

    /// Lets the kernel hand over at once what waits below the mark.
    pub fn lower(&self) {
        if let Some(low_water) = &self.low_water {
            low_water.lower();
        }
    }

    fn is_raised(&self) -> bool {
        self.low_water.as_ref().is_some_and(LowWater::is_raised)
    }

    fn on_pulse(&self, now: Instant) {
        let silent = now.saturating_duration_since(self.last_read.get());
        if self.is_raised() && silent >= UNSEEN {
            self.lower();
        }
        self.looks.set(self.is_raised() && silent >= FLOW);
        if (self.is_due() || self.looks.get())
            && let Some(waker) = self.waker.borrow().as_ref()
        {
            waker.wake_by_ref();
        }
    }
}

/// Appends the payload without its mask (RFC 6455 5.3).
fn unmask_into(audio: &mut BytesMut, payload: &[u8], mask: [u8; 4]) {
    let start = audio.len();
    audio.extend_from_slice(payload);
    let Some(added) = audio.get_mut(start..) else { return };
    let [a, b, c, d] = mask;
    let word = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let (words, tail) = added.as_chunks_mut();
    for chunk in words {
        *chunk = (u64::from_ne_bytes(*chunk) ^ word).to_ne_bytes();
    }
    tail.iter_mut().zip([a, b, c, d, a, b, c]).for_each(|(byte, mask)| *byte ^= mask);
}

/// One timer for all sockets of a worker.
mod pulse {
    use super::*;

    thread_local! {
        static LOOKED_AFTER: RefCell<Vec<Weak<Intake>>> = const { RefCell::new(Vec::new()) };
    }

    /// The first one starts the pulse, and it ends with the last.
    pub fn look_after(intake: &Rc<Intake>) {
        let is_first = LOOKED_AFTER.with_borrow_mut(|all| {
            all.push(Rc::downgrade(intake));
            all.len() == 1
        });
        if is_first {
            actix_rt::spawn(beat(Arc::clone(&intake.stats.totals().read_stalls)));
        }
    }

    /// It does not come while something else has the thread, and then no socket of it is read: that is told too.
    async fn beat(stalls: Arc<ReadStalls>) {
        let mut ticks = tokio::time::interval(PULSE);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut due = Instant::now();
        loop {
            let expected = stalls.expect_at(due, PULSE);
            ticks.tick().await;
            drop(expected);
            due = Instant::now() + PULSE;
            let now = Instant::now();
            let idle = LOOKED_AFTER.with_borrow_mut(|all| {
                all.retain(|intake| intake.upgrade().inspect(|intake| intake.on_pulse(now)).is_some());
                all.is_empty()
            });
            if idle {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn intake() -> Rc<Intake> {
        let stats = Arc::new(TrackStats::new(PcmFormat::LIVEKIT, Arc::default()));
        Intake::new(PcmFormat::LIVEKIT, stats, Clock::start(), None)
    }

    #[actix_rt::test]
    async fn payloads_of_any_length_are_unmasked() {
        let intake = intake();
        let mask = [0x37, 0xfa, 0x21, 0x3d];
        let mut expected = Vec::new();
        for length in [1, 3, 4, 7, 8, 9, 15, 16, 17, 1_920] {
            let plain: Vec<u8> = (0..length).map(|at| (at * 7 + length) as u8).collect();
            let masked: Vec<u8> = plain.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
            intake.push(&masked, mask, masked.len());
            expected.extend(plain);
        }
        assert_eq!(intake.take().expect("audio").audio, expected);
        assert!(intake.take().is_none());
    }

    #[actix_rt::test]
    async fn a_batch_is_whole_after_150_ms_of_audio() {
        let intake = intake();
        intake.push(&[1; 28_796], [0; 4], 28_796);
        assert!(!intake.is_full());
        intake.push(&[1; 4], [0; 4], 4);
        assert!(intake.is_full());
        assert_eq!(intake.take().map(|batch| batch.audio.len()), Some(28_800));
    }

    #[actix_rt::test]
    async fn i1_a_thread_that_does_something_else_is_seen_to_read_no_socket() {
        let intake = intake();
        let stalls = Arc::clone(&intake.stats.totals().read_stalls);
        // The pulse has begun, and knows when it is due.
        tokio::time::sleep(PULSE * 2).await;
        let busy = Duration::from_millis(500);
        std::thread::sleep(busy);
        assert!(stalls.longest() >= busy - PULSE, "{stalls:?} while it goes on");
        tokio::time::sleep(PULSE * 2).await;
        assert!(stalls.longest() >= busy - PULSE, "{stalls:?} when it is over");
    }

    #[actix_rt::test]
    async fn a_batch_that_does_not_fill_up_wakes_its_reader() {
        let intake = intake();
        intake.push(&[1; 4], [0; 4], 4);
        let woken = std::future::poll_fn(|context| {
            intake.wake_later(context.waker());
            if intake.is_due() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        });
        tokio::time::timeout(Duration::from_secs(10), woken).await.expect("the pulse wakes");
    }
}
