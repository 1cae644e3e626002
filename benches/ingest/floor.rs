//! The floor: the least that any recorder of these sockets must do, on one thread.
//!
//! It accepts WebSocket upgrades, reads frames, unmasks them in place, writes each read's payload to the connection's file at once
//! and corrects the WAV header when the track closes. It checks nothing but the framing and sends nothing but the answers to the
//! handshake and to the Close. Per message that makes one read, one write and a share of one `epoll_wait`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, bail};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::process::Signal;

use crate::load::HANDSHAKE_ACCEPT;
use crate::recordings::{HEADER_BYTES, wav_header};

const READ_BUFFER_BYTES: usize = 16 * 1024;
const EVENTS_PER_WAIT: usize = 256;
const LISTENER: u64 = u64::MAX;

/// Serves until it is killed, or until the benchmark that started it ends.
pub fn run(directory: &Path) -> anyhow::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen")?;
    listener.set_nonblocking(true)?;
    let epoll = epoll::create(CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
    eprintln!("floor is listening address={}", listener.local_addr()?);

    let mut connections: Vec<Option<Connection>> = Vec::new();
    let mut events = Vec::with_capacity(EVENTS_PER_WAIT);
    loop {
        match epoll::wait(&epoll, spare_capacity(&mut events), None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for events"),
        }
        for event in events.drain(..) {
            let token = event.data.u64();
            if token == LISTENER {
                while let Some(stream) = unless_would_block(listener.accept())?.map(|(stream, _)| stream) {
                    stream.set_nonblocking(true)?;
                    let token = u64::try_from(connections.len())?;
                    epoll::add(&epoll, &stream, EventData::new_u64(token), EventFlags::IN)?;
                    connections.push(Some(Connection::new(stream)));
                }
            } else if let Some(slot) = connections.get_mut(usize::try_from(token)?)
                && let Some(connection) = slot
                && connection.on_readable(directory).context("a connection failed")? == Progress::Ended
            {
                *slot = None; // closes the socket, which takes it off the epoll set
            }
        }
    }
}

fn unless_would_block<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

#[derive(PartialEq)]
enum Progress {
    Open,
    Ended,
}

struct Connection {
    stream: TcpStream,
    recording: Option<Recording>, // `None` during the handshake
    buffer: Box<[u8]>,
    /// Bytes at the buffer's start that wait for the rest of a frame's header, or of the handshake.
    held: usize,
}

struct Recording {
    file: File,
    data_bytes: u32,
    frame: Frame,
}

/// The frame whose payload is arriving.
#[derive(Default)]
struct Frame {
    payload_left: usize,
    is_audio: bool,
    /// Turned so that its first byte belongs to the next payload byte.
    mask: [u8; 4],
}

impl Connection {
    fn new(stream: TcpStream) -> Self {
        Self { stream, recording: None, buffer: vec![0; READ_BUFFER_BYTES].into(), held: 0 }
    }

    fn on_readable(&mut self, directory: &Path) -> anyhow::Result<Progress> {
        let room = self.buffer.get_mut(self.held..).context("more is held than fits")?;
        let Some(count) = unless_would_block(self.stream.read(room))? else {
            return Ok(Progress::Open);
        };
        if count == 0 {
            if let Some(recording) = &self.recording {
                recording.seal()?;
            }
            return Ok(Progress::Ended);
        }
        let mut filled = self.held + count;
        let recording = if let Some(recording) = &mut self.recording {
            recording
        } else {
            let arrived = self.buffer.get(..filled).context("a read overran")?;
            let Some(end) = arrived.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4) else {
                self.held = filled;
                return Ok(Progress::Open);
            };
            let recording = Recording::create(directory, &String::from_utf8_lossy(arrived))?;
            self.stream.write_all(
                format!(
                    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                     Sec-WebSocket-Accept: {HANDSHAKE_ACCEPT}\r\n\r\n"
                )
                .as_bytes(),
            )?;
            self.buffer.copy_within(end..filled, 0);
            filled -= end;
            self.recording.insert(recording)
        };

        let arrived = self.buffer.get_mut(..filled).context("a read overran")?;
        let (taken, progress) = recording.append(arrived)?;
        self.held = filled - taken;
        if self.held > 0 {
            self.buffer.copy_within(taken..filled, 0);
        }
        if progress == Progress::Ended {
            recording.seal()?;
            self.stream.write_all(&[0x88, 0x00])?;
        }
        Ok(progress)
    }
}

impl Recording {
    fn create(directory: &Path, request: &str) -> anyhow::Result<Self> {
        let (_, rest) = request.split_once("trackId=").context("the request names no trackId")?;
        let track: String = rest.chars().take_while(char::is_ascii_alphanumeric).collect();
        let mut file = File::create_new(directory.join(format!("floor_{track}.wav"))).context("cannot make a file")?;
        file.write_all(&wav_header(0))?;
        Ok(Self { file, data_bytes: 0, frame: Frame::default() })
    }

    /// Unmasks and writes what is whole in `bytes`; returns how many of them are done with.
    fn append(&mut self, bytes: &mut [u8]) -> anyhow::Result<(usize, Progress)> {
        // The audio of one read is moved together behind its first frame's header; a read of one frame moves nothing.
        let mut audio = 0..0;
        let mut at = 0;
        let mut progress = Progress::Open;
        while progress == Progress::Open {
            if self.frame.payload_left > 0 {
                let end = bytes.len().min(at + self.frame.payload_left);
                if at == end {
                    break;
                }
                let payload = bytes.get_mut(at..end).context("a frame overran the buffer")?;
                self.frame.unmask(payload);
                if self.frame.is_audio {
                    if audio.is_empty() {
                        audio = at..end;
                    } else {
                        bytes.copy_within(at..end, audio.end);
                        audio.end += end - at;
                    }
                }
                at = end;
            } else {
                let Some((header_bytes, opcode, frame)) = Frame::parse(bytes.get(at..).unwrap_or_default())? else {
                    break;
                };
                at += header_bytes;
                self.frame = frame;
                if opcode == 0x8 {
                    progress = Progress::Ended;
                }
            }
        }
        let audio = bytes.get(audio).context("the audio overran the buffer")?;
        if !audio.is_empty() {
            self.file.write_all(audio).context("cannot write")?;
            self.data_bytes += u32::try_from(audio.len())?;
        }
        Ok((at, progress))
    }

    fn seal(&self) -> anyhow::Result<()> {
        let header: [u8; HEADER_BYTES] = wav_header(self.data_bytes);
        self.file.write_all_at(&header, 0).context("cannot correct the header")
    }
}

impl Frame {
    /// Reads a header off the start: its length, the opcode and the frame; `None` while it is not whole.
    fn parse(bytes: &[u8]) -> anyhow::Result<Option<(usize, u8, Self)>> {
        let [first, second, rest @ ..] = bytes else {
            return Ok(None);
        };
        if second & 0x80 == 0 {
            bail!("a frame came without a mask");
        }
        let (length_bytes, payload_left, rest) = match (second & 0x7f, rest) {
            (126, [a, b, rest @ ..]) => (2, usize::from(u16::from_be_bytes([*a, *b])), rest),
            (127, [a, b, c, d, e, f, g, h, rest @ ..]) => (8, usize::try_from(u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]))?, rest),
            (126 | 127, _) => return Ok(None),
            (length, rest) => (0, usize::from(length), rest),
        };
        let Some(mask) = rest.first_chunk() else {
            return Ok(None);
        };
        let opcode = first & 0x0f;
        let is_audio = matches!(opcode, 0x0 | 0x2); // continuation and binary
        Ok(Some((2 + length_bytes + 4, opcode, Self { payload_left, is_audio, mask: *mask })))
    }

    fn unmask(&mut self, payload: &mut [u8]) {
        let [a, b, c, d] = self.mask;
        let word = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
        let (words, tail) = payload.as_chunks_mut();
        for chunk in words {
            *chunk = (u64::from_ne_bytes(*chunk) ^ word).to_ne_bytes();
        }
        tail.iter_mut().zip(self.mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
        self.mask.rotate_left(payload.len() % 4);
        self.payload_left -= payload.len();
    }
}
