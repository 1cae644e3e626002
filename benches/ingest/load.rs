//! The load: LiveKit's track egress, many times, from one process and as few threads as keep the schedule.
//!
//! What each connection sends is docs/FACTS.md, egress socket to 1.3 and 1.8: the handshake of Go's client, one masked binary message of
//! 1,920 bytes each 10 ms, an empty Close at the end. Contract: all of it is the same for every sink, and costs little beside it.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};

use crate::recordings::{BYTES_PER_CHUNK, seed};

/// Bounded so that the counters of `recordings` neither wrap nor reach zero.
pub const MAX_TRACKS: u16 = 4000;
pub const MAX_SECONDS: u16 = 600;

const CHUNK_INTERVAL: Duration = Duration::from_millis(10);
/// The tracks send in this many bursts per interval, 1 ms apart. A timer for each message would cost the generator more than sending
/// it; four times as many bursts left the floor's figure as it was (820 and 830 µs/s, measured).
const SLOTS: u16 = 10;
const SLOT_INTERVAL: Duration = Duration::from_millis(1);
/// What one thread sends with ease: on loopback, where a send does most of the receiver's TCP work, 500 tracks take half of a core
/// (measured).
const TRACKS_PER_WRITER: usize = 600;
const CONNECTORS: usize = 8;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long one send may wait for a sink that has stopped reading (egress PR #1353 gives it as long).
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// The key and the accept value of RFC 6455 section 1.3, so that neither side needs a hash.
pub const HANDSHAKE_KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
pub const HANDSHAKE_ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// RFC 6455 section 5.7's example; not zero, so that no sink can save the unmasking.
const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];
/// A final binary frame, masked, with a 16-bit length of 1,920 (RFC 6455 section 5.2).
const FRAME_HEADER: [u8; 8] = [0x82, 0xfe, 0x07, 0x80, MASK[0], MASK[1], MASK[2], MASK[3]];
const FRAME_BYTES: usize = FRAME_HEADER.len() + BYTES_PER_CHUNK;
const OPCODE_CLOSE: u8 = 0x8;

/// The messages that one track sends in that time.
pub fn chunks_in(time: Duration) -> u32 {
    u32::try_from(time.as_millis() / CHUNK_INTERVAL.as_millis()).expect("MAX_SECONDS bounds the time")
}

/// One egress connection.
pub struct Connection {
    track: u16,
    stream: TcpStream,
    next_sample: u32,
    inbox: Vec<u8>,
    fault: Option<String>,
}

/// Opens all tracks, a few at a time.
pub fn connect(address: SocketAddr, tracks: u16) -> anyhow::Result<Vec<Connection>> {
    let numbers: Vec<u16> = (0..tracks).collect();
    let chunk = numbers.len().div_ceil(CONNECTORS);
    thread::scope(|scope| {
        let connectors: Vec<_> = numbers
            .chunks(chunk)
            .map(|share| {
                scope.spawn(move || {
                    let open = |track: &u16| Connection::open(address, *track).with_context(|| format!("track {track} cannot connect"));
                    share.iter().map(open).collect::<anyhow::Result<Vec<_>>>()
                })
            })
            .collect();
        let mut connections = Vec::with_capacity(numbers.len());
        for connector in connectors {
            connections.extend(connector.join().map_err(|_| anyhow!("a connecting thread panicked"))??);
        }
        Ok(connections)
    })
}

impl Connection {
    fn open(address: SocketAddr, track: u16) -> anyhow::Result<Self> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
        stream.set_write_timeout(Some(SEND_TIMEOUT))?;
        let path = format!("/egress-audio?roomName=bench&participant=p{track}&trackId=TR{track}&meetingId=bench");
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: Go-http-client/1.1\r\nConnection: Upgrade\r\n\
             Content-Type: audio/x-raw\r\nSec-WebSocket-Key: {HANDSHAKE_KEY}\r\nSec-WebSocket-Version: 13\r\n\
             Upgrade: websocket\r\n\r\n"
        );
        stream.write_all(request.as_bytes())?;

        let mut inbox = Vec::new();
        let end = loop {
            ensure!(receive(&mut stream, &mut inbox)? > 0, "the sink hung up during the handshake");
            if let Some(end) = inbox.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
        };
        let head = inbox.drain(..end).collect();
        let head = String::from_utf8(head).context("the answer to the handshake is not text")?;
        ensure!(
            head.starts_with("HTTP/1.1 101") && head.contains(HANDSHAKE_ACCEPT),
            "the handshake was answered with:\n{head}{}",
            String::from_utf8_lossy(&inbox)
        );
        Ok(Self { track, stream, next_sample: seed(track), inbox, fault: None })
    }

    fn send_chunk(&mut self, frame: &mut [u8; FRAME_BYTES]) {
        if self.fault.is_some() {
            return;
        }
        let mask = u32::from_le_bytes(MASK);
        if let Some(payload) = frame.get_mut(FRAME_HEADER.len()..) {
            for word in payload.as_chunks_mut().0 {
                *word = (self.next_sample ^ mask).to_le_bytes();
                self.next_sample = self.next_sample.wrapping_add(1);
            }
        }
        if let Err(error) = self.stream.write_all(frame) {
            self.fault = Some(format!("track {}: cannot send: {error}", self.track));
        }
    }

    fn send_close(&mut self) {
        let [a, b, c, d] = MASK;
        if self.fault.is_none()
            && let Err(error) = self.stream.write_all(&[0x80 | OPCODE_CLOSE, 0x80, a, b, c, d])
        {
            self.fault = Some(format!("track {}: cannot send Close: {error}", self.track));
        }
    }

    /// Reads until the sink's Close or the end of the stream.
    fn await_close(&mut self, deadline: Instant) {
        while self.fault.is_none() && !has_close(&mut self.inbox) {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let received = self.stream.set_read_timeout(Some(left)).and_then(|()| receive(&mut self.stream, &mut self.inbox));
            match received {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => self.fault = Some(format!("track {}: no Close within {CLOSE_TIMEOUT:?}: {error}", self.track)),
            }
        }
    }
}

fn receive(stream: &mut TcpStream, inbox: &mut Vec<u8>) -> io::Result<usize> {
    let mut buffer = [0; 1024];
    let count = stream.read(&mut buffer)?;
    inbox.extend_from_slice(buffer.get(..count).unwrap_or_default());
    Ok(count)
}

/// Takes whole frames of the sink (never masked, RFC 6455 section 5.1) off the inbox; true once one is a Close.
fn has_close(inbox: &mut Vec<u8>) -> bool {
    loop {
        let (opcode, header, length) = match inbox.as_slice() {
            [first, 126, high, low, ..] => (first & 0xf, 4, usize::from(u16::from_be_bytes([*high, *low]))),
            [first, length @ ..=125, ..] => (first & 0xf, 2, usize::from(*length)),
            _ => return false,
        };
        if opcode == OPCODE_CLOSE {
            return true;
        }
        if inbox.len() < header + length {
            return false;
        }
        inbox.drain(..header + length);
    }
}

/// How far behind its schedule each burst was sent completely.
#[derive(Clone, Copy, Default)]
pub struct Lateness {
    pub worst: Duration,
    total: Duration,
    bursts: u32,
}

impl Lateness {
    pub fn mean(&self) -> Duration {
        self.total.checked_div(self.bursts).unwrap_or_default()
    }

    fn note(&mut self, lateness: Duration) {
        self.worst = self.worst.max(lateness);
        self.total += lateness;
        self.bursts += 1;
    }

    fn merge(&mut self, other: Self) {
        self.worst = self.worst.max(other.worst);
        self.total += other.total;
        self.bursts += other.bursts;
    }
}

/// A load under way.
pub struct Streaming {
    started_at: Instant,
    writers: Vec<JoinHandle<(Vec<Connection>, Lateness)>>,
}

/// What became of it.
pub struct Streamed {
    pub lateness: Lateness,
    /// From the first Close sent to the last one answered.
    pub slowest_close: Duration,
    pub faults: Vec<String>,
}

/// All tracks at once say nothing for a while, and do not catch up: as when egress cannot reach its sink for longer than it keeps audio.
#[derive(Clone, Copy, Default)]
pub struct Pause {
    pub after_chunks: u32,
    pub lasts: Duration,
}

/// Starts the threads that send `chunks` messages on every connection.
pub fn start(mut connections: Vec<Connection>, chunks: u32, pause: Pause) -> anyhow::Result<Streaming> {
    let started_at = Instant::now() + Duration::from_millis(50);
    let mut writers = Vec::new();
    while !connections.is_empty() {
        let share = connections.split_off(connections.len().saturating_sub(TRACKS_PER_WRITER));
        let writer = thread::Builder::new().name("writer".to_owned());
        writers.push(writer.spawn(move || write(share, chunks, pause, started_at)).context("cannot start a writer")?);
    }
    Ok(Streaming { started_at, writers })
}

impl Streaming {
    /// When the first message is due.
    pub fn started_at(&self) -> Instant {
        self.started_at
    }

    /// Waits until the sink's death has reached every track. Returns their numbers, each with the frames that were sent.
    pub fn cut_off(self) -> anyhow::Result<Vec<(u16, u32)>> {
        let mut sent = Vec::new();
        for writer in self.writers {
            let (share, _) = writer.join().map_err(|_| anyhow!("a writer panicked"))?;
            sent.extend(share.into_iter().map(|connection| (connection.track, connection.next_sample.wrapping_sub(seed(connection.track)))));
        }
        Ok(sent)
    }

    /// Waits for the last message, then closes every track as LiveKit does and waits for the sink's answers.
    pub fn finish(self) -> anyhow::Result<Streamed> {
        let mut connections = Vec::new();
        let mut lateness = Lateness::default();
        for writer in self.writers {
            let (share, late) = writer.join().map_err(|_| anyhow!("a writer panicked"))?;
            connections.extend(share);
            lateness.merge(late);
        }
        let closing_at = Instant::now();
        connections.iter_mut().for_each(Connection::send_close);
        for connection in &mut connections {
            connection.await_close(closing_at + CLOSE_TIMEOUT);
        }
        let slowest_close = closing_at.elapsed();
        Ok(Streamed { lateness, slowest_close, faults: connections.into_iter().filter_map(|it| it.fault).collect() })
    }
}

fn write(mut connections: Vec<Connection>, chunks: u32, pause: Pause, started_at: Instant) -> (Vec<Connection>, Lateness) {
    let mut lateness = Lateness::default();
    let mut frame = [0; FRAME_BYTES];
    frame.iter_mut().zip(FRAME_HEADER).for_each(|(byte, header)| *byte = header);

    for chunk in 0..chunks {
        if connections.iter().all(|connection| connection.fault.is_some()) {
            break;
        }
        let started_at = if chunk < pause.after_chunks { started_at } else { started_at + pause.lasts };
        for slot in 0..SLOTS {
            let due = started_at + CHUNK_INTERVAL * chunk + SLOT_INTERVAL * u32::from(slot);
            thread::sleep(due.saturating_duration_since(Instant::now()));
            for connection in connections.iter_mut().filter(|connection| connection.track % SLOTS == slot) {
                connection.send_chunk(&mut frame);
            }
            lateness.note(due.elapsed());
        }
    }
    (connections, lateness)
}
