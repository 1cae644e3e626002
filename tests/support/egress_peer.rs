//! LiveKit's Track Egress as a WebSocket client, byte for byte, on a bare TCP stream.
//!
//! Owns one connection to the server under test. There is no WebSocket library in it, so a test decides every byte. The facts
//! are those of `docs/FACTS.md`, egress socket; handshake, fragmentation and Close were also compared with what gorilla/websocket
//! v1.5.3, the library LiveKit uses, puts on the wire. What the server sends is read in [`EgressPeer::poll_incoming`],
//! [`EgressPeer::next_frame`], [`EgressPeer::go_on`] and the closing calls only, and must itself be correct WebSocket, else the peer panics.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};

/// 480 frames of 16-bit stereo: the 10 ms default of GStreamer's audio aggregator (docs/FACTS.md, egress socket).
pub const CHUNK_BYTES: usize = 1_920;
/// The time one such chunk lasts at 48 kHz (docs/FACTS.md, egress socket).
pub const CHUNK_TIME: Duration = Duration::from_millis(10);
/// gorilla's `defaultWriteBufferSize`: a longer client message is cut into continuation frames of this size (conn.go).
pub const GORILLA_WRITE_BUFFER: usize = 4_096;
/// Longest wait for the server; past it the peer panics and says what was missing.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Opcodes, RFC 6455 section 5.2.
pub const CONTINUATION: u8 = 0x0;
pub const TEXT: u8 = 0x1;
pub const BINARY: u8 = 0x2;
pub const CLOSE: u8 = 0x8;
pub const PING: u8 = 0x9;
pub const PONG: u8 = 0xA;

/// The sample nonce of RFC 6455 section 1.3 and the answer that the RFC computes for it.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// What a sender's handshake says besides the fixed headers; the default is LiveKit's.
#[derive(Clone, Copy, Debug)]
pub struct Handshake<'a> {
    pub content_type: Option<&'a str>,
    pub headers: &'a [(&'a str, &'a str)],
}

impl Default for Handshake<'_> {
    fn default() -> Self {
        Self { content_type: Some("audio/x-raw"), headers: &[] }
    }
}

/// The server's answer when it is not 101. LiveKit itself throws it away (docs/FACTS.md, egress socket).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the handshake was refused with {status} ({content_type}): {body}")]
pub struct Refusal {
    pub status: u16,
    pub content_type: String,
    pub body: String,
}

/// One frame from the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub opcode: u8,
    pub fin: bool,
    pub payload: Vec<u8>,
}

/// How the server ended the connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CloseSeen {
    /// Whether a Close frame came; without one the end is a bare FIN or RST.
    pub close_frame: bool,
    /// The Close frame's code, if it carried one.
    pub code: Option<u16>,
    pub reason: String,
    /// Whether an RST came, be it in answer to bytes that the server had no more use for.
    pub reset: bool,
}

/// What has been handed to the kernel since the handshake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// All bytes, frame headers included.
    pub wire_bytes: usize,
    /// Payload of complete binary messages.
    pub audio_bytes: usize,
}

#[derive(Debug)]
pub struct EgressPeer {
    stream: TcpStream,
    unparsed: Vec<u8>,
    inbox: VecDeque<Frame>,
    ended: bool,
    reset: bool,
    close_sent: bool,
    sent: Sent,
    /// When the next chunk of what is sent in real time is due.
    due: Instant,
}

impl EgressPeer {
    /// Connects as LiveKit does.
    ///
    /// # Errors
    /// Any answer but 101.
    pub async fn connect(addr: SocketAddr, path_and_query: &str) -> Result<Self, Refusal> {
        Self::connect_with(addr, path_and_query, Handshake::default()).await
    }

    /// Connects as another sender; its headers are sorted in among the fixed ones, as Go's `Header.Write` does.
    ///
    /// # Errors
    /// Any answer but 101.
    pub async fn connect_with(addr: SocketAddr, path_and_query: &str, handshake: Handshake<'_>) -> Result<Self, Refusal> {
        let mut headers = vec![("Connection", "Upgrade"), ("Sec-WebSocket-Key", KEY), ("Sec-WebSocket-Version", "13"), ("Upgrade", "websocket")];
        headers.extend(handshake.content_type.map(|value| ("Content-Type", value)));
        headers.extend(handshake.headers);
        headers.sort_unstable();
        let mut request = format!("GET {path_and_query} HTTP/1.1\r\nHost: {addr}\r\nUser-Agent: Go-http-client/1.1\r\n");
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str("\r\n");

        within("the answer to the handshake", async {
            let mut stream = TcpStream::connect(addr).await.expect("the server listens");
            stream.set_nodelay(true).expect("TCP_NODELAY, Go's default, can be set");
            stream.write_all(request.as_bytes()).await.expect("the server takes the handshake");
            let (head, unparsed) = read_head(&mut stream).await;
            let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("no status in {head:?}"));
            if status != 101 {
                return Err(read_refusal(stream, status, &head, unparsed).await);
            }
            // What gorilla's client checks (client.go), and RFC 6455 section 4.1: nothing was offered, so nothing may be chosen.
            let named = |name, token: &str| header(&head, name).is_some_and(|value| value.eq_ignore_ascii_case(token));
            assert!(named("upgrade", "websocket") && named("connection", "upgrade"), "no upgrade in {head:?}");
            assert_eq!(header(&head, "sec-websocket-accept"), Some(ACCEPT), "wrong Sec-WebSocket-Accept in {head:?}");
            let chosen = header(&head, "sec-websocket-extensions").or(header(&head, "sec-websocket-protocol"));
            assert_eq!(chosen, None, "an extension or subprotocol was chosen in {head:?}");
            Ok(Self {
                stream,
                unparsed,
                inbox: VecDeque::new(),
                ended: false,
                reset: false,
                close_sent: false,
                sent: Sent::default(),
                due: Instant::now(),
            })
        })
        .await
    }

    /// Sends PCM as LiveKit cuts it, one binary frame for 10 ms, as fast as the server takes it.
    ///
    /// # Errors
    /// The write's, as for every `send_…`: the server closed or reset the connection.
    pub async fn send_pcm(&mut self, pcm: &[u8]) -> io::Result<()> {
        for chunk in pcm.chunks(CHUNK_BYTES) {
            self.send_binary(chunk).await?;
        }
        Ok(())
    }

    /// Sends PCM at real time on an absolute schedule that begins now, as a sender's clock does, and answers pings in between.
    pub async fn send_realtime(&mut self, pcm: &[u8]) -> io::Result<()> {
        self.due = Instant::now();
        self.go_on(pcm).await
    }

    /// Goes on with the schedule of what was sent before: whoever is late between two parts catches up, and leaves no hole.
    pub async fn go_on(&mut self, pcm: &[u8]) -> io::Result<()> {
        for chunk in pcm.chunks(CHUNK_BYTES) {
            sleep_until(self.due).await;
            self.take_in().await;
            self.send_binary(chunk).await?;
            self.due += CHUNK_TIME;
        }
        Ok(())
    }

    /// Has nothing to say for so long, on the same schedule.
    pub async fn pause(&mut self, time: Duration) {
        self.due += time;
        sleep_until(self.due).await;
    }

    /// Sends one binary message in one frame, whatever its size.
    pub async fn send_binary(&mut self, message: &[u8]) -> io::Result<()> {
        self.send_raw(&frame(BINARY, true, message, true)).await?;
        self.sent.audio_bytes += message.len();
        Ok(())
    }

    /// Sends one binary message in frames of `piece` bytes; gorilla's piece is [`GORILLA_WRITE_BUFFER`].
    pub async fn send_fragmented(&mut self, message: &[u8], piece: usize) -> io::Result<()> {
        let pieces = message.len().div_ceil(piece);
        for (index, payload) in message.chunks(piece).enumerate() {
            let opcode = if index == 0 { BINARY } else { CONTINUATION };
            self.send_raw(&frame(opcode, index + 1 == pieces, payload, true)).await?;
        }
        self.sent.audio_bytes += message.len();
        Ok(())
    }

    pub async fn send_text(&mut self, text: &str) -> io::Result<()> {
        self.send_raw(&frame(TEXT, true, text.as_bytes(), true)).await
    }

    /// Sends the only text LiveKit ever sends (docs/FACTS.md, egress socket).
    pub async fn mute(&mut self, muted: bool) -> io::Result<()> {
        self.send_text(if muted { r#"{"muted":true}"# } else { r#"{"muted":false}"# }).await
    }

    /// Sends the ping that LiveKit sends every 30 s (docs/FACTS.md, egress socket); the schedule is the test's.
    pub async fn ping(&mut self) -> io::Result<()> {
        self.send_raw(&frame(PING, true, b"ping", true)).await
    }

    /// Sends bytes as they are: half a frame, a violation, a flood.
    pub async fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let written = within("the server to read on", self.stream.write(rest)).await;
            self.reset |= written.is_err(); // an RST is told once, to whoever asks first: tcp_reset in Linux's tcp_input.c
            rest = rest.split_at(written?).1;
        }
        self.sent.wire_bytes += bytes.len();
        Ok(())
    }

    pub fn sent(&self) -> Sent {
        self.sent
    }

    /// Answers the pings that have arrived, and hands over all frames that have, without waiting for more.
    pub async fn poll_incoming(&mut self) -> Vec<Frame> {
        self.take_in().await;
        self.inbox.drain(..).collect()
    }

    /// Waits for the server's next frame; a ping is answered and handed over too. `None` is the end of the connection.
    pub async fn next_frame(&mut self) -> Option<Frame> {
        loop {
            self.take_in().await;
            if self.ended || !self.inbox.is_empty() {
                return self.inbox.pop_front();
            }
            within("a frame from the server", self.stream.readable()).await.expect("the socket can be polled");
        }
    }

    /// Ends as LiveKit does: a Close frame without a code, and TCP closed at once (docs/FACTS.md, egress socket).
    pub async fn close_abruptly_after_close_frame(mut self) -> io::Result<()> {
        self.take_in().await; // LiveKit's read loop leaves nothing unread, which would turn the FIN into an RST
        self.send_raw(&frame(CLOSE, true, &[], true)).await
    }

    /// Sends the same Close frame, but stays until the server has answered it and closed TCP.
    pub async fn close_and_wait(mut self) -> CloseSeen {
        self.close_sent = true;
        self.send_raw(&frame(CLOSE, true, &[], true)).await.ok(); // if the server was first, its end is what is seen
        within("the server's Close frame and FIN", self.until_end()).await
    }

    /// Waits, within [`PATIENCE`], for the server to end the connection by itself, and answers its pings. Its Close is echoed as gorilla does.
    pub async fn expect_close(mut self) -> CloseSeen {
        within("the server to close the connection", self.until_end()).await
    }

    /// Ends with RST, as a host that lost the connection's state.
    pub fn reset(self) {
        self.stream.set_zero_linger().expect("SO_LINGER can be set");
    }

    /// Ends with a bare FIN, as a killed egress process (docs/FACTS.md, egress socket). Closing with unread input makes that an RST, so it is read first.
    pub async fn vanish(mut self) {
        self.take_in().await;
    }

    async fn until_end(&mut self) -> CloseSeen {
        let mut seen = CloseSeen::default();
        while let Some(received) = self.next_frame().await {
            assert!(!seen.close_frame, "{received:?} came after the Close frame (RFC 6455 section 5.5.1)");
            if received.opcode != CLOSE {
                continue;
            }
            seen.close_frame = true;
            if let Some((code, reason)) = received.payload.split_first_chunk() {
                seen.code = Some(u16::from_be_bytes(*code));
                seen.reason = String::from_utf8(reason.to_vec()).expect("a Close reason is UTF-8 (RFC 6455 section 5.5.1)");
            }
            if !self.close_sent {
                self.close_sent = true;
                let code = received.payload.get(..2).unwrap_or_default(); // gorilla echoes the code, not the reason
                self.send_raw(&frame(CLOSE, true, code, true)).await.ok(); // the server need not wait for it
            }
        }
        seen.reset = self.reset;
        seen
    }

    /// Reads all that has arrived. A ping is answered with the payload `pong`, never an echo (docs/FACTS.md, egress socket), until a Close was sent.
    async fn take_in(&mut self) {
        tokio::task::yield_now().await; // a current-thread runtime looks at its sockets only between tasks
        let mut chunk = [0; 4_096];
        while !self.ended {
            match self.stream.try_read(&mut chunk) {
                Ok(0) => self.ended = true,
                Ok(length) => self.unparsed.extend_from_slice(chunk.split_at(length).0),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => (self.ended, self.reset) = (true, true),
                Err(error) => panic!("reading from the server failed: {error}"),
            }
        }
        while let Some((received, length)) = parse(&self.unparsed) {
            self.unparsed.drain(..length);
            if received.opcode == PING && !self.close_sent {
                self.send_raw(&frame(PONG, true, b"pong", true)).await.ok(); // egress ignores the error too
            }
            self.inbox.push_back(received);
        }
    }
}

/// Builds one frame (RFC 6455 section 5.2). `opcode` may carry reserved bits, and nothing else is checked either.
pub fn frame(opcode: u8, fin: bool, payload: &[u8], masked: bool) -> Vec<u8> {
    let mask_bit = if masked { 0x80 } else { 0 };
    let mut bytes = vec![opcode | if fin { 0x80 } else { 0 }];
    match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
        (Ok(length @ ..=125), _) => bytes.push(mask_bit | length),
        (_, Ok(length)) => {
            bytes.push(mask_bit | 126);
            bytes.extend(length.to_be_bytes());
        }
        _ => {
            bytes.push(mask_bit | 127);
            bytes.extend(u64::try_from(payload.len()).expect("a length fits 64 bits").to_be_bytes());
        }
    }
    if masked {
        let key = mask_key();
        bytes.extend(key);
        bytes.extend(payload.iter().zip(key.iter().cycle()).map(|(byte, key)| byte ^ key));
    } else {
        bytes.extend(payload);
    }
    bytes
}

/// 16-bit stereo PCM whose frames count up from `seed`: low half left, high half right. Any loss, doubling or swap shows.
pub fn counter_pcm(frames: usize, seed: u32) -> Vec<u8> {
    std::iter::successors(Some(seed), |count| Some(count.wrapping_add(1))).take(frames).flat_map(u32::to_le_bytes).collect()
}

/// 16-bit PCM of a sine, the same on all channels; `amplitude` is a fraction of full scale.
pub fn tone(rate: u32, channels: u16, hz: f64, seconds: f64, amplitude: f64) -> Vec<u8> {
    let step = std::f64::consts::TAU * hz / f64::from(rate);
    let frames = (seconds * f64::from(rate)).round() as u32;
    (0..frames)
        .map(|index| (amplitude * f64::from(i16::MAX) * (step * f64::from(index)).sin()).round() as i16)
        .flat_map(|sample| sample.to_le_bytes().repeat(usize::from(channels)))
        .collect()
}

/// A key that differs from frame to frame: a Weyl sequence by 2^32 over the golden ratio. The server must not care (RFC 6455 section 5.3).
fn mask_key() -> [u8; 4] {
    static KEYS: AtomicU32 = AtomicU32::new(0x9E37_79B9);
    KEYS.fetch_add(0x9E37_79B9, Ordering::Relaxed).to_le_bytes()
}

/// Takes one whole server frame off the front, with its length on the wire.
fn parse(bytes: &[u8]) -> Option<(Frame, usize)> {
    let [first, second, extended @ ..] = bytes else { return None };
    assert_eq!(first & 0x70, 0, "the server set a reserved bit (RFC 6455 section 5.2)");
    assert_eq!(second & 0x80, 0, "the server masked a frame (RFC 6455 section 5.1)");
    let (header, length) = match second & 0x7F {
        126 => (4, usize::from(u16::from_be_bytes(*extended.first_chunk()?))),
        127 => (10, usize::try_from(u64::from_be_bytes(*extended.first_chunk()?)).expect("a length fits in memory")),
        short => (2, usize::from(short)),
    };
    let (opcode, fin) = (first & 0x0F, first & 0x80 != 0);
    assert!(opcode < CLOSE || (fin && length <= 125), "the server sent a broken control frame (RFC 6455 section 5.5)");
    assert!(opcode != CLOSE || length != 1, "the server sent half a Close code (RFC 6455 section 5.5.1)");
    let payload = bytes.get(header..header + length)?.to_vec();
    Some((Frame { opcode, fin, payload }, header + length))
}

/// Reads an answer's head, and whatever came along behind it.
async fn read_head(stream: &mut TcpStream) -> (String, Vec<u8>) {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let rest = bytes.split_off(end + 4);
            return (String::from_utf8(bytes).expect("the answer's head is text"), rest);
        }
        let length = stream.read_buf(&mut bytes).await.expect("the answer to the handshake can be read");
        assert_ne!(length, 0, "the server closed without answering the handshake: {:?}", String::from_utf8_lossy(&bytes));
    }
}

/// Reads a refusal's body, which ends by its length or with the connection.
async fn read_refusal(stream: TcpStream, status: u16, head: &str, mut body: Vec<u8>) -> Refusal {
    assert_eq!(header(head, "transfer-encoding"), None, "a refusal is a small body of known length");
    let length: usize = header(head, "content-length").map_or(usize::MAX, |length| length.parse().expect("Content-Length is a number"));
    let missing = u64::try_from(length.saturating_sub(body.len())).expect("a length fits 64 bits");
    stream.take(missing).read_to_end(&mut body).await.expect("the refusal's body can be read");
    let content_type = header(head, "content-type").unwrap_or_default().to_owned();
    Refusal { status, content_type, body: String::from_utf8(body).expect("the refusal's body is text") }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().filter_map(|line| line.split_once(':')).find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("waited {PATIENCE:?} for {what}"))
}
