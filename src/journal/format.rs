//! How a record lies in a file: `LMj1`, the payload's length, when it was written, a checksum over these and the payload, and the payload.
//!
//! Lengths and times are little-endian. The mark cannot stand in front of a valid record inside a payload: payloads are JSON, which holds no NUL byte, and
//! the length of a record has one.

/// Begins each record.
const MARK: [u8; 4] = *b"LMj1";
/// Mark, length, time, checksum.
pub const HEADER_BYTES: usize = 20;
/// A webhook of 1 MiB whose every byte is escaped, with what else is known of it.
pub const MAX_PAYLOAD_BYTES: usize = (1 << 24) - 1;

/// A record in a run of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found<'a> {
    /// Milliseconds since 1970.
    pub at_ms: i64,
    pub payload: &'a [u8],
    /// With its header.
    pub length: usize,
}

/// What a run of bytes begins with.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<'a> {
    Record(Found<'a>),
    /// The beginning of a record, and nothing behind it: it was being written when the process or the machine ended.
    Torn,
    /// So many bytes that are no record, up to the next one or the end.
    Corrupt(usize),
    End,
}

/// A record that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a record of {0} bytes is too long for the journal")]
pub struct TooLong(usize);

/// Appends a record to `bytes`.
///
/// # Errors
/// For a payload over [`MAX_PAYLOAD_BYTES`].
pub fn encode(at_ms: i64, payload: &[u8], bytes: &mut Vec<u8>) -> Result<(), TooLong> {
    let length = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= MAX_PAYLOAD_BYTES).ok_or(TooLong(payload.len()))?;
    bytes.extend(MARK);
    bytes.extend(length.to_le_bytes());
    bytes.extend(at_ms.to_le_bytes());
    bytes.extend(checksum(length, at_ms, payload).to_le_bytes());
    bytes.extend(payload);
    Ok(())
}

/// Reads what `bytes`, which go on to the end of their file, begin with.
pub fn next(bytes: &[u8]) -> Next<'_> {
    if bytes.is_empty() {
        return Next::End;
    }
    if let Some(found) = record(bytes) {
        return Next::Record(found);
    }
    let later = (1..bytes.len()).find(|offset| bytes.get(*offset..).is_some_and(|rest| rest.starts_with(&MARK) && record(rest).is_some()));
    match later {
        Some(offset) => Next::Corrupt(offset),
        None if is_beginning(bytes) => Next::Torn,
        None => Next::Corrupt(bytes.len()),
    }
}

/// The whole record that `bytes` begin with.
pub fn record(bytes: &[u8]) -> Option<Found<'_>> {
    let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>()?;
    let (mark, fields) = header.split_first_chunk::<4>()?;
    let (length, fields) = fields.split_first_chunk::<4>()?;
    let (at, sum) = fields.split_first_chunk::<8>()?;
    let (length, at_ms) = (u32::from_le_bytes(*length), i64::from_le_bytes(*at));
    let payload = rest.get(..usize::try_from(length).ok()?)?;
    let is_whole = *mark == MARK && payload.len() <= MAX_PAYLOAD_BYTES && sum == checksum(length, at_ms, payload).to_le_bytes();
    is_whole.then_some(Found { at_ms, payload, length: HEADER_BYTES + payload.len() })
}

/// Whether a record could begin so and end behind these bytes.
fn is_beginning(bytes: &[u8]) -> bool {
    if !bytes.iter().zip(&MARK).all(|(byte, mark)| byte == mark) {
        return false;
    }
    let length = bytes.get(4..8).and_then(|length| length.try_into().ok()).map(u32::from_le_bytes);
    length.and_then(|length| usize::try_from(length).ok()).is_none_or(|length| length <= MAX_PAYLOAD_BYTES && bytes.len() < HEADER_BYTES + length)
}

fn checksum(length: u32, at_ms: i64, payload: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&length.to_le_bytes());
    sum.update(&at_ms.to_le_bytes());
    sum.update(payload);
    sum.finalize()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(payloads: &[Vec<u8>]) -> (Vec<u8>, Vec<usize>) {
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for (number, payload) in payloads.iter().enumerate() {
            encode(number as i64, payload, &mut bytes).expect("short enough");
            ends.push(bytes.len());
        }
        (bytes, ends)
    }

    /// Every record, and how it ended: what was corrupt, and whether the tail was torn.
    fn read(mut bytes: &[u8]) -> (Vec<Vec<u8>>, usize, bool) {
        let (mut payloads, mut corrupt) = (Vec::new(), 0);
        loop {
            let length = match next(bytes) {
                Next::Record(found) => {
                    payloads.push(found.payload.to_vec());
                    found.length
                }
                Next::Corrupt(length) => {
                    corrupt += length;
                    length
                }
                Next::Torn => return (payloads, corrupt, true),
                Next::End => return (payloads, corrupt, false),
            };
            bytes = &bytes[length..];
        }
    }

    /// Payloads as they are: JSON, so without NUL.
    fn payloads() -> impl Strategy<Value = Vec<Vec<u8>>> {
        proptest::collection::vec(proptest::collection::vec(1u8..=255, 0..300), 0..12)
    }

    #[test]
    fn a_record_too_long_is_refused_and_nothing_is_written() {
        let mut bytes = vec![7];
        assert!(encode(0, &vec![b'x'; MAX_PAYLOAD_BYTES + 1], &mut bytes).is_err());
        assert_eq!(bytes, [7]);
    }

    proptest! {
        #[test]
        fn w6_a_file_cut_anywhere_gives_the_records_before_the_cut(payloads in payloads(), cut in any::<prop::sample::Index>()) {
            let (bytes, ends) = written(&payloads);
            let cut = cut.index(bytes.len() + 1);
            let whole = ends.iter().filter(|end| **end <= cut).count();
            let is_boundary = cut == 0 || ends.contains(&cut);
            prop_assert_eq!(read(&bytes[..cut]), (payloads[..whole].to_vec(), 0, !is_boundary));
        }

        #[test]
        fn w6_garbage_behind_the_records_hides_none_of_them(payloads in payloads(), garbage in proptest::collection::vec(any::<u8>(), 0..200)) {
            let (mut bytes, _) = written(&payloads);
            bytes.extend(&garbage);
            let (found, corrupt, torn) = read(&bytes);
            prop_assert_eq!(found, payloads);
            prop_assert!(garbage.is_empty() || torn || corrupt == garbage.len());
        }

        #[test]
        fn w6_a_byte_that_has_changed_costs_its_own_record_alone(
            payloads in payloads(), place in any::<prop::sample::Index>(), change in 1u8..=255,
        ) {
            let (mut bytes, ends) = written(&payloads);
            prop_assume!(!bytes.is_empty());
            let place = place.index(bytes.len());
            bytes[place] ^= change;
            let hit = ends.iter().position(|end| place < *end).expect("inside a record");
            let mut rest = payloads.clone();
            rest.remove(hit);
            let (found, corrupt, torn) = read(&bytes);
            prop_assert_eq!(found, rest);
            // The last one may look as if it went on.
            prop_assert!(corrupt > 0 || (torn && hit + 1 == payloads.len()));
        }

        #[test]
        fn w6_any_bytes_are_read_to_their_end(bytes in proptest::collection::vec(any::<u8>(), 0..2_000)) {
            read(&bytes);
        }
    }
}
