//! The canonical 44-byte RIFF header of a PCM WAV file.
//!
//! Not RF64 and not WAVE_FORMAT_EXTENSIBLE: Python's `wave` rejects the one and analysis services the other (`docs/FACTS.md`, WAV readers).

use crate::audio::format::PcmFormat;

/// Bytes in front of the first sample.
pub const HEADER_BYTES: u64 = 44;

/// The most PCM that a file may hold, so that every reader takes its size for a positive 32-bit number.
pub const MAX_DATA_BYTES: u64 = 0x7fff_ffff - HEADER_BYTES;

/// The header for `data_bytes` of PCM, at most [`MAX_DATA_BYTES`]; a torn last frame is not declared.
pub fn encode(format: PcmFormat, data_bytes: u64) -> [u8; 44] {
    let whole = format.frames(data_bytes.min(MAX_DATA_BYTES)) * format.frame_bytes();
    let data = u32::try_from(whole).expect("bounded by MAX_DATA_BYTES");
    let byte_rate = u32::try_from(format.byte_rate()).expect("192 kHz stereo is below 2^32");
    let frame_bytes = u16::try_from(format.frame_bytes()).expect("a frame is 2 or 4 bytes");
    let mut header = [0; 44];
    let fields: [(usize, &[u8]); 13] = [
        (0, b"RIFF"),
        (4, &(data + 36).to_le_bytes()),
        (8, b"WAVE"),
        (12, b"fmt "),
        (16, &16u32.to_le_bytes()),
        (20, &1u16.to_le_bytes()),
        (22, &format.channels.to_le_bytes()),
        (24, &format.sample_rate.to_le_bytes()),
        (28, &byte_rate.to_le_bytes()),
        (32, &frame_bytes.to_le_bytes()),
        (34, &16u16.to_le_bytes()),
        (36, b"data"),
        (40, &data.to_le_bytes()),
    ];
    for (start, bytes) in fields {
        for (slot, byte) in header.iter_mut().skip(start).zip(bytes) {
            *slot = *byte;
        }
    }
    header
}

/// Reads the format back. `None` for anything that [`encode`] did not write.
pub fn decode(header: &[u8; 44]) -> Option<PcmFormat> {
    declared(header).map(|(format, _)| format)
}

/// Reads the format back, whatever the header says of sizes: a crash, or another program, may have left any there.
pub fn format_of(header: &[u8; 44]) -> Option<PcmFormat> {
    let mut sized = *header;
    for (start, bytes) in [(4, 36u32.to_le_bytes()), (40, [0; 4])] {
        for (slot, byte) in sized.iter_mut().skip(start).zip(bytes) {
            *slot = byte;
        }
    }
    decode(&sized)
}

/// Reads the format and the bytes of PCM back. `None` for anything that [`encode`] did not write.
pub fn declared(header: &[u8; 44]) -> Option<(PcmFormat, u64)> {
    let [.., c0, c1, r0, r1, r2, r3, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] = *header;
    let format = PcmFormat { sample_rate: u32::from_le_bytes([r0, r1, r2, r3]), channels: u16::from_le_bytes([c0, c1]) };
    let [.., d0, d1, d2, d3] = *header;
    let data = u64::from(u32::from_le_bytes([d0, d1, d2, d3]));
    let sane = (1..=2).contains(&format.channels) && (8_000..=192_000).contains(&format.sample_rate) && data <= MAX_DATA_BYTES;
    (sane && encode(format, data) == *header).then_some((format, data))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hound_reads_what_is_encoded() {
        for (sample_rate, channels) in [(8_000, 1), (48_000, 2), (192_000, 2)] {
            let format = PcmFormat { sample_rate, channels };
            let mut file = encode(format, 8).to_vec();
            file.extend([1, 0, 2, 0, 3, 0, 4, 0]);
            let mut reader = hound::WavReader::new(file.as_slice()).expect("a WAV file");
            let spec = hound::WavSpec { channels, sample_rate, bits_per_sample: 16, sample_format: hound::SampleFormat::Int };
            assert_eq!(reader.spec(), spec);
            assert_eq!(reader.samples::<i16>().map(|sample| sample.expect("a sample")).collect::<Vec<_>>(), [1, 2, 3, 4]);
        }
    }

    #[test]
    fn a_torn_frame_is_not_declared() {
        assert_eq!(encode(PcmFormat::LIVEKIT, 11), encode(PcmFormat::LIVEKIT, 8));
    }

    #[test]
    fn the_format_is_read_back_and_foreign_headers_are_not() {
        let header = encode(PcmFormat::LIVEKIT, 400);
        assert_eq!((decode(&header), declared(&header)), (Some(PcmFormat::LIVEKIT), Some((PcmFormat::LIVEKIT, 400))));
        let mut foreign = header;
        foreign[20] = 3;
        assert_eq!(decode(&foreign), None);
    }
}
