//! H.264 as a byte stream with start codes (ITU-T H.264, Annex B): how many pictures it has, and where a decoder can start.

/// The start code, behind at least two zeros.
const START: u8 = 1;
/// Types of NAL units (ITU-T H.264, table 7-1): a slice, its first partition, a slice of an IDR picture, a sequence parameter set.
const SLICE: u8 = 1;
const PARTITION_A: u8 = 2;
const IDR_SLICE: u8 = 5;
const SEQUENCE: u8 = 7;

/// Counts the pictures of a stream that is cut anywhere: slices whose `first_mb_in_slice` is 0, each of which begins one. Of interlaced video,
/// fields that are coded apart count apart.
#[derive(Debug, Clone, Default)]
pub struct PictureCounter {
    at: At,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// So many zeros have just passed, 2 at most are told apart.
    Data { zeros: u8 },
    /// Behind a start code.
    UnitHeader,
    /// At the first byte of a slice.
    SliceHeader,
}

impl Default for At {
    fn default() -> Self {
        Self::Data { zeros: 0 }
    }
}

impl PictureCounter {
    /// The pictures that begin in the next bytes of the stream.
    pub fn push(&mut self, bytes: &[u8]) -> u64 {
        let mut pictures = 0;
        for byte in bytes {
            self.at = match (self.at, *byte) {
                (At::Data { zeros: 2 }, START) => At::UnitHeader,
                (At::Data { zeros }, 0) => At::Data { zeros: (zeros + 1).min(2) },
                (At::UnitHeader, header) if matches!(unit_type(header), SLICE | PARTITION_A | IDR_SLICE) => At::SliceHeader,
                (At::SliceHeader, first) => {
                    // An Exp-Golomb 0 is the single bit 1.
                    pictures += u64::from(first >> 7);
                    At::Data { zeros: u8::from(first == 0) }
                }
                (At::UnitHeader, 0) => At::Data { zeros: 1 },
                (At::Data { .. } | At::UnitHeader, _) => At::Data { zeros: 0 },
            };
        }
        pictures
    }
}

/// Whether a message begins with a start code: the first of a stream does, or it is no such stream. A short one may be the beginning of one.
pub fn begins_with_start_code(message: &[u8]) -> bool {
    let zeros = message.iter().take_while(|byte| **byte == 0).count();
    match message.get(zeros) {
        Some(first) => *first == START && zeros >= 2,
        None => true,
    }
}

/// Whether a decoder can start with this message: it begins with a unit of its own, and a sequence parameter set comes before any slice.
pub fn can_start(message: &[u8]) -> bool {
    if !begins_with_start_code(message) {
        return false;
    }
    let units = message.windows(4).filter_map(|window| match window {
        [0, 0, START, header] => Some(unit_type(*header)),
        _ => None,
    });
    units.into_iter().find(|unit| matches!(*unit, SLICE | PARTITION_A | IDR_SLICE | SEQUENCE)) == Some(SEQUENCE)
}

/// A whole stream cut into access units: each has one picture, and what belongs in front of it.
pub fn access_units(stream: &[u8]) -> Vec<&[u8]> {
    let (mut cuts, mut has_slice) = (vec![0], false);
    for (at, window) in stream.windows(5).enumerate() {
        let [0, 0, START, header, first] = *window else { continue };
        let is_slice = matches!(unit_type(header), SLICE | PARTITION_A | IDR_SLICE);
        // Supplements, parameter sets and delimiters stand in front of a picture.
        let begins = if is_slice { first >> 7 == 1 } else { (6..=9).contains(&unit_type(header)) };
        if begins && has_slice {
            // A start code may have a third zero.
            let start = at.checked_sub(1).filter(|before| stream.get(*before) == Some(&0)).unwrap_or(at);
            cuts.push(start);
            has_slice = false;
        }
        has_slice |= is_slice;
    }
    cuts.push(stream.len());
    cuts.iter().zip(cuts.iter().skip(1)).filter_map(|(start, end)| stream.get(*start..*end)).filter(|unit| !unit.is_empty()).collect()
}

fn unit_type(header: u8) -> u8 {
    header & 0x1f
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A parameter set, a picture in two slices, one in one slice.
    const STREAM: [u8; 33] = [
        0, 0, 0, 1, 0x67, 0x42, 0, 0x1e, // sequence
        0, 0, 0, 1, 0x68, 0xce, // picture parameters
        0, 0, 1, 0x65, 0x88, 0, // the first slice of an IDR picture
        0, 0, 1, 0x65, 0x44, 7, // another of it
        0, 0, 0, 1, 0x41, 0x9a, 3, // the next picture
    ];

    #[test]
    fn a_picture_is_its_first_slice() {
        assert_eq!(PictureCounter::default().push(&STREAM), 2);
    }

    proptest! {
        #[test]
        fn however_it_is_cut(cuts in proptest::collection::vec(0usize..33, 0..8)) {
            let mut cuts = cuts;
            cuts.extend([0, STREAM.len()]);
            cuts.sort_unstable();
            let mut counter = PictureCounter::default();
            let pictures: u64 = cuts.windows(2).map(|cut| counter.push(&STREAM[cut[0]..cut[1]])).sum();
            prop_assert_eq!(pictures, 2);
        }
    }

    #[test]
    fn a_decoder_starts_with_a_parameter_set() {
        assert!(can_start(&STREAM));
        assert!(can_start(&[&[0, 0, 0, 1, 0x09, 0xf0][..], &STREAM[..]].concat()), "behind a delimiter");
        assert!(!can_start(&STREAM[14..]), "an IDR picture alone has no parameters");
        assert!(!can_start(&STREAM[26..]), "a picture that builds on others");
        assert!(!can_start(&STREAM[4..]), "the middle of a unit");
        assert!(!can_start(&[]));
    }

    #[test]
    fn access_units_begin_with_what_belongs_to_their_picture() {
        let stream = [&STREAM[..], &STREAM[..]].concat();
        let units = access_units(&stream);
        assert_eq!(units.iter().map(|unit| unit.len()).collect::<Vec<_>>(), [26, 7, 26, 7]);
        assert_eq!(units.concat(), stream);
        assert!(access_units(&[]).is_empty());
    }

    #[test]
    fn other_streams_do_not_begin_with_a_start_code() {
        for good in [&STREAM[..], &[0, 0, 1], &[0, 0], &[]] {
            assert!(begins_with_start_code(good), "{good:?}");
        }
        for bad in [&[0, 0, 2, 0x35, 0x67][..], &[1], b"DKIF", &[0x10, 2, 0, 0x9d]] {
            assert!(!begins_with_start_code(bad), "{bad:?}");
        }
    }
}
