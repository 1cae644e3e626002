//! Cuts a stream of whole frames into groups, by time or size.

use super::format::PcmFormat;
use super::level::Level;

/// How groups are cut.
#[derive(Debug, Clone, Copy)]
pub struct GroupLimits {
    /// Length of a group in seconds, 0.1 to 30.
    pub seconds: f64,
    /// Upper bound of a group in bytes.
    pub bytes: u64,
}

/// One stretch of a track for analysis.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// 1 for the first group of a connection.
    pub sequence: u64,
    /// Where it starts in the connection's audio, in frames.
    pub start_frame: u64,
    pub format: PcmFormat,
    pub bytes: u64,
    /// The largest magnitude, 0 for digital silence.
    pub peak: u16,
    /// The PCM, if somebody wants it.
    pub audio: Vec<u8>,
}

impl Group {
    pub fn frames(&self) -> u64 {
        self.format.frames(self.bytes)
    }

    pub fn is_silent(&self) -> bool {
        self.peak == 0
    }

    pub fn duration_ms(&self) -> u64 {
        self.format.frame_ms(self.frames())
    }

    pub fn start_ms(&self) -> u64 {
        self.format.frame_ms(self.start_frame)
    }
}

/// Collects frames until a group is full. Keeps audio only when asked to, else counts.
#[derive(Debug)]
pub struct Grouper {
    format: PcmFormat,
    limits: GroupLimits,
    keep_audio: bool,
    /// While the format is in doubt: everything so far, uncut.
    in_doubt: Option<Vec<u8>>,
    open: Group,
}

impl Grouper {
    /// `in_doubt`: nothing is cut until [`Grouper::settle`] says the format.
    pub fn new(format: PcmFormat, limits: GroupLimits, keep_audio: bool, in_doubt: bool) -> Self {
        let open = Group { sequence: 1, start_frame: 0, format, bytes: 0, peak: 0, audio: Vec::new() };
        Self { format, limits, keep_audio, in_doubt: in_doubt.then(Vec::new), open }
    }

    /// From now on nobody wants the audio, or somebody does.
    pub fn keep_audio(&mut self, keep: bool) {
        self.keep_audio = keep;
        if !keep {
            self.open.audio = Vec::new();
        }
    }

    /// Takes whole frames and returns the groups that became full.
    pub fn push(&mut self, pcm: &[u8]) -> Vec<Group> {
        if let Some(held) = &mut self.in_doubt {
            held.extend_from_slice(pcm);
            return Vec::new();
        }
        let mut full = Vec::new();
        let mut rest = pcm;
        while !rest.is_empty() {
            let room = self.group_bytes().saturating_sub(self.open.bytes);
            let take = usize::try_from(room).unwrap_or(usize::MAX).min(rest.len());
            let (head, tail) = rest.split_at(take);
            self.open.bytes += u64::try_from(head.len()).unwrap_or(0);
            self.open.peak = self.open.peak.max(Level::of(head).peak);
            if self.keep_audio {
                self.open.audio.extend_from_slice(head);
            }
            if self.open.bytes >= self.group_bytes() {
                full.push(self.cut());
            }
            rest = tail;
        }
        full
    }

    /// Says the true format. Groups that are already cut stay; what is held or open is cut by the new one.
    pub fn settle(&mut self, format: PcmFormat) -> Vec<Group> {
        let position_bytes = self.open.start_frame * self.format.frame_bytes();
        self.format = format;
        self.open.format = format;
        self.open.start_frame = format.frames(position_bytes);
        match self.in_doubt.take() {
            Some(held) => self.push(&held),
            None => Vec::new(),
        }
    }

    /// Nothing came for so many frames: what follows lies so much later. The group that was open ends in front of them.
    pub fn skip(&mut self, frames: u64) -> Vec<Group> {
        if self.in_doubt.is_some() {
            return Vec::new();
        }
        let cut = (self.open.bytes > 0).then(|| self.cut());
        self.open.start_frame += frames;
        cut.into_iter().collect()
    }

    /// The last, shorter group.
    pub fn flush(&mut self) -> Vec<Group> {
        let mut groups = if self.in_doubt.is_some() { self.settle(self.format) } else { Vec::new() };
        if self.open.bytes > 0 {
            groups.push(self.cut());
        }
        groups
    }

    /// Bytes of a full group: whole frames, at least one.
    fn group_bytes(&self) -> u64 {
        let frame = self.format.frame_bytes();
        let by_time = self.format.bytes_in(std::time::Duration::from_secs_f64(self.limits.seconds));
        (by_time.min(self.limits.bytes) / frame * frame).max(frame)
    }

    fn cut(&mut self) -> Group {
        let next = Group {
            sequence: self.open.sequence + 1,
            start_frame: self.open.start_frame + self.open.frames(),
            format: self.format,
            bytes: 0,
            peak: 0,
            audio: Vec::with_capacity(self.open.audio.len()),
        };
        std::mem::replace(&mut self.open, next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MONO_8K: PcmFormat = PcmFormat { sample_rate: 8_000, channels: 1 };

    fn grouper(seconds: f64, bytes: u64) -> Grouper {
        Grouper::new(MONO_8K, GroupLimits { seconds, bytes }, true, false)
    }

    fn ramp(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|i| (i % 251) as u8).collect()
    }

    #[test]
    fn groups_are_cut_by_time_and_the_rest_is_flushed() {
        let mut grouper = grouper(0.5, 1 << 20);
        let audio = ramp(20_000);
        let mut groups: Vec<Group> = audio.chunks(1_234).flat_map(|piece| grouper.push(piece)).collect();
        groups.extend(grouper.flush());
        assert_eq!(groups.iter().map(|group| group.bytes).collect::<Vec<_>>(), [8_000, 8_000, 4_000]);
        assert_eq!(groups.iter().map(|group| group.start_frame).collect::<Vec<_>>(), [0, 4_000, 8_000]);
        assert_eq!(groups.iter().map(|group| group.sequence).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(groups.iter().flat_map(|group| group.audio.clone()).collect::<Vec<_>>(), audio);
        assert!(grouper.flush().is_empty());
    }

    #[test]
    fn the_size_bound_cuts_whole_frames() {
        let groups = grouper(30.0, 1_001).push(&ramp(3_000));
        assert_eq!(groups.iter().map(|group| group.bytes).collect::<Vec<_>>(), [1_000, 1_000, 1_000]);
    }

    #[test]
    fn without_a_taker_no_audio_is_kept_but_all_is_counted() {
        let mut grouper = Grouper::new(MONO_8K, GroupLimits { seconds: 0.5, bytes: 1 << 20 }, false, false);
        let groups = grouper.push(&ramp(8_000));
        assert_eq!((groups[0].bytes, groups[0].audio.len()), (8_000, 0));
        assert!(groups[0].peak > 0);
        grouper.keep_audio(true);
        grouper.push(&ramp(4_000));
        grouper.keep_audio(false);
        let groups = grouper.push(&ramp(4_000));
        assert_eq!((groups[0].bytes, groups[0].audio.len()), (8_000, 0));
    }

    #[test]
    fn a_doubtful_format_is_cut_once_it_is_settled() {
        let stereo = PcmFormat { channels: 2, ..MONO_8K };
        let mut grouper = Grouper::new(MONO_8K, GroupLimits { seconds: 0.5, bytes: 1 << 20 }, true, true);
        assert!(grouper.push(&ramp(20_000)).is_empty());
        let groups = grouper.settle(stereo);
        assert_eq!(groups.iter().map(|group| (group.bytes, group.format)).collect::<Vec<_>>(), [(16_000, stereo)]);
        assert_eq!(grouper.flush()[0].start_frame, 4_000);
    }

    #[test]
    fn a_stream_that_ends_in_doubt_is_cut_as_declared() {
        let mut grouper = Grouper::new(MONO_8K, GroupLimits { seconds: 0.5, bytes: 1 << 20 }, true, true);
        grouper.push(&ramp(9_000));
        assert_eq!(grouper.flush().iter().map(|group| group.bytes).collect::<Vec<_>>(), [8_000, 1_000]);
    }

    #[test]
    fn what_was_skipped_moves_what_follows() {
        let mut grouper = grouper(0.5, 1 << 20);
        let before = grouper.push(&[1; 40]);
        let cut = grouper.skip(1_000);
        assert_eq!((before.len(), cut.len(), cut[0].start_frame), (0, 1, 0));
        grouper.push(&[1; 4]);
        let after = grouper.flush();
        assert_eq!((after[0].start_frame, after[0].sequence), (cut[0].frames() + 1_000, 2));
        assert!(grouper.skip(5).is_empty(), "nothing was open");
    }
}
