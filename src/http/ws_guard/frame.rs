//! The frames of RFC 6455 in a stream of bytes that is cut anywhere.

use bytes::{Buf, Bytes, BytesMut};

pub(super) const CONTINUATION: u8 = 0;
pub(super) const TEXT: u8 = 1;
pub(super) const BINARY: u8 = 2;
pub(super) const CLOSE: u8 = 8;
pub(super) const PING: u8 = 9;
pub(super) const PONG: u8 = 10;
/// Two bytes, eight of the length, four of the mask.
const MAX_HEADER_BYTES: usize = 14;

/// A frame's header, read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub fin: bool,
    pub opcode: u8,
    pub header_bytes: usize,
    pub payload_bytes: u64,
}

impl Header {
    /// Of header and payload together.
    fn frame_bytes(self) -> usize {
        self.header_bytes.saturating_add(usize::try_from(self.payload_bytes).unwrap_or(usize::MAX))
    }
}

/// How much of the next frame is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Front {
    /// The header, once it is whole.
    Partial(Option<Header>),
    Whole(Header),
}

/// What has been read and not been taken: the start of a frame that was cut, then the last chunk. Copies no more than what was cut.
#[derive(Debug, Default)]
pub(super) struct Unread {
    cut: BytesMut,
    chunk: Bytes,
    /// The last chunk, with what was taken of it. While it is held, actix-http reads into a new buffer, which is as large as what came; it would
    /// otherwise go on with the largest that a connection ever needed (`docs/performance.md`).
    held: Bytes,
}

impl Unread {
    /// Contract: the chunk before it is used up, as it is after [`Front::Partial`].
    pub fn add(&mut self, chunk: Bytes) {
        debug_assert!(self.chunk.is_empty());
        self.held = chunk.clone();
        self.chunk = chunk;
    }

    /// The same with bytes that are nobody else's.
    pub fn add_alone(&mut self, chunk: Bytes) {
        self.add(chunk);
        self.held = Bytes::new();
    }

    /// Looks at the next frame.
    pub fn front(&mut self) -> Result<Front, &'static str> {
        loop {
            let front = if self.cut.is_empty() { &self.chunk[..] } else { &self.cut[..] };
            let header = parse(front)?;
            if let Some(header) = header.filter(|header| front.len() >= header.frame_bytes()) {
                return Ok(Front::Whole(header));
            }
            if self.cut.is_empty() || self.chunk.is_empty() {
                return Ok(Front::Partial(header));
            }
            let whole = header.map_or(MAX_HEADER_BYTES, Header::frame_bytes);
            let lacking = whole.saturating_sub(self.cut.len()).min(self.chunk.len());
            self.cut.extend_from_slice(&self.chunk.split_to(lacking));
        }
    }

    /// Keeps a frame that was cut, and lets go of the chunk.
    pub fn keep_cut(&mut self) {
        if !self.chunk.is_empty() {
            self.cut.extend_from_slice(&std::mem::take(&mut self.chunk));
        }
        self.chunk = Bytes::new();
    }

    /// Takes the frame that [`Unread::front`] has just found whole.
    pub fn take(&mut self, header: Header) -> Bytes {
        let bytes = header.frame_bytes();
        if self.cut.is_empty() { self.chunk.split_to(bytes) } else { self.cut.split_to(bytes).freeze() }
    }

    /// Lets `with` see the mask and the payload of that frame, and is done with it.
    pub fn consume(&mut self, header: Header, with: impl FnOnce(&[u8], [u8; 4])) {
        let bytes = header.frame_bytes();
        let front = if self.cut.is_empty() { &self.chunk[..] } else { &self.cut[..] };
        let (head, payload) = front.get(..bytes).and_then(|frame| frame.split_at_checked(header.header_bytes)).unwrap_or_default();
        with(payload, head.last_chunk().copied().unwrap_or_default());
        if self.cut.is_empty() {
            self.chunk.advance(bytes);
        } else {
            self.cut.advance(bytes);
        }
    }

    /// Of frames with their headers.
    pub fn bytes(&self) -> usize {
        self.cut.len() + self.chunk.len()
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Reads a client's frame header. `None` while it is not whole.
pub(super) fn parse(buffer: &[u8]) -> Result<Option<Header>, &'static str> {
    let [first, second, rest @ ..] = buffer else { return Ok(None) };
    if first & 0x70 != 0 {
        return Err("reserved bits");
    }
    if second & 0x80 == 0 {
        return Err("an unmasked frame");
    }
    let (length_bytes, payload_bytes) = match (second & 0x7f, rest) {
        (126, [a, b, ..]) => (2, u64::from(u16::from_be_bytes([*a, *b]))),
        (127, [a, b, c, d, e, f, g, h, ..]) => (8, u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h])),
        (126 | 127, _) => return Ok(None),
        (short, _) => (0, u64::from(short)),
    };
    // Two bytes, the length, four of the mask.
    let header_bytes = 2 + length_bytes + 4;
    Ok(Some(Header { fin: first & 0x80 != 0, opcode: first & 0x0f, header_bytes, payload_bytes }))
}
