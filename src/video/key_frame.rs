//! What the first bytes of a VP8 or VP9 picture say (`docs/FACTS.md`, video).

/// Of a picture, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dimensions {
    pub width: u32,
    pub height: u32,
}

/// What a picture is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sight {
    /// A decoder can start here.
    Key(Dimensions),
    /// It builds on others.
    Delta,
    /// No picture of that codec.
    Foreign,
}

/// Looks at a VP8 frame (RFC 6386, 9.1).
pub fn vp8(picture: &[u8]) -> Sight {
    match picture {
        // The lowest bit of the tag is 0 for a key frame; behind three bytes of tag, three of start code.
        [tag, _, _, 0x9d, 0x01, 0x2a, w0, w1, h0, h1, ..] if tag & 1 == 0 => {
            // Two bits of each are a scale.
            let pixels = |low: u8, high: u8| u32::from(u16::from_le_bytes([low, high]) & 0x3fff);
            Sight::Key(Dimensions { width: pixels(*w0, *w1), height: pixels(*h0, *h1) })
        }
        [tag, _, _, ..] if tag & 1 == 1 => Sight::Delta,
        _ => Sight::Foreign,
    }
}

/// Looks at a VP9 frame, or the first one of a superframe (VP9 bitstream specification, 6.2 and 7.2).
pub fn vp9(picture: &[u8]) -> Sight {
    let mut bits = Bits { bytes: picture, position: 0 };
    uncompressed_header(&mut bits).unwrap_or(Sight::Foreign)
}

/// `None` where it ends too early.
fn uncompressed_header(bits: &mut Bits<'_>) -> Option<Sight> {
    const MARKER: u32 = 0b10;
    const SYNC_CODE: u32 = 0x49_83_42;
    const RGB: u32 = 7;
    if bits.take(2)? != MARKER {
        return Some(Sight::Foreign);
    }
    let profile = bits.take(1)? + 2 * bits.take(1)?;
    if profile == 3 && bits.take(1)? != 0 {
        return Some(Sight::Foreign);
    }
    let (shows_existing, is_delta) = (bits.take(1)? == 1, bits.take(1)? == 1);
    if shows_existing || is_delta {
        return Some(Sight::Delta);
    }
    let (_shown, _error_resilient) = (bits.take(1)?, bits.take(1)?);
    if bits.take(24)? != SYNC_CODE {
        return Some(Sight::Foreign);
    }
    let _twelve_bit = if profile >= 2 { bits.take(1)? } else { 0 };
    let sampled_freely = profile == 1 || profile == 3;
    // The range and the two subsamplings with their reserved bit; RGB has a reserved bit alone.
    let behind_color_space = match (bits.take(3)?, sampled_freely) {
        (RGB, true) => 1,
        (RGB, false) => 0,
        (_, true) => 4,
        (_, false) => 1,
    };
    bits.take(behind_color_space)?;
    let (width, height) = (bits.take(16)? + 1, bits.take(16)? + 1);
    Some(Sight::Key(Dimensions { width, height }))
}

/// Bits, the highest of each byte first.
struct Bits<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl Bits<'_> {
    fn take(&mut self, count: u32) -> Option<u32> {
        let mut value = 0;
        for _ in 0..count {
            let byte = self.bytes.get(self.position / 8)?;
            value = value << 1 | u32::from(byte >> (7 - self.position % 8) & 1);
            self.position += 1;
        }
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(|byte| matches!(byte, b'0' | b'1')).map(|byte| byte - b'0').collect();
        digits.chunks(8).map(|byte| byte.iter().enumerate().fold(0, |sum, (at, bit)| sum | bit << (7 - at))).collect()
    }

    #[test]
    fn a_vp8_key_frame_has_its_size_without_the_scale() {
        let key = [0x10, 0x02, 0x00, 0x9d, 0x01, 0x2a, 0x40, 0x41, 0xf0, 0x80, 0, 0];
        assert_eq!(vp8(&key), Sight::Key(Dimensions { width: 320, height: 240 }));
        assert_eq!(vp8(&[0x11, 0x02, 0x00, 1]), Sight::Delta);
        for foreign in [&[][..], &[0x11, 0], &key[..9], &[0, 0, 0, 1, 0x67, 0x42, 0, 0x1e, 0, 0], b"DKIF\0\0\x20\0VP80"] {
            assert_eq!(vp8(foreign), Sight::Foreign, "{foreign:?}");
        }
    }

    #[test]
    fn a_vp9_key_frame_has_its_size_in_every_profile() {
        let sync = "01001001 10000011 01000010";
        let size = "0000001001111111 0000000101100111";
        let cases = [
            ("profile 0", format!("10 00 0 0 1 0 {sync} 010 0 {size}")),
            ("profile 1", format!("10 10 0 0 1 0 {sync} 010 0 00 0 {size}")),
            ("profile 1, RGB", format!("10 10 0 0 1 0 {sync} 111 0 {size}")),
            ("profile 2", format!("10 01 0 0 1 0 {sync} 1 010 0 {size}")),
            ("profile 3", format!("10 11 0 0 0 1 0 {sync} 0 010 0 11 0 {size}")),
        ];
        for (case, header) in cases {
            assert_eq!(vp9(&bits(&header)), Sight::Key(Dimensions { width: 640, height: 360 }), "{case}");
        }
        assert_eq!(vp9(&bits("10 00 0 1 1 0 0000")), Sight::Delta, "a frame that builds on others");
        assert_eq!(vp9(&bits("10 00 1 001 0")), Sight::Delta, "one that shows another again");
        for foreign in [vec![], vec![0x44], bits("10 00 0 0 1 0 00000000 00000000 00000001"), bits(&format!("10 00 0 0 1 0 {sync}"))] {
            assert_eq!(vp9(&foreign), Sight::Foreign, "{foreign:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_looked_at_without_harm(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..40)) {
            vp8(&bytes);
            vp9(&bytes);
        }
    }
}
