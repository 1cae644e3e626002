//! The store's calls about finished files, and about those that a crash kept from being finished.

use std::collections::BTreeMap;

use super::rows::ClosedSegment;
use super::rows::seals::{SealRow, SegmentInContext};
use super::{DbError, Engine, POOL_WAIT, Store, postgres, sqlite};
use crate::ids::{RecordingId, SegmentId};

impl Store {
    /// What is known of the finished files of recordings, by their segments' ids.
    pub async fn seals_of(&self, recordings: Vec<String>) -> Result<BTreeMap<String, SealRow>, DbError> {
        run!(self, reader, seals::of(&recordings))
    }

    /// The first hash of a file stays.
    pub async fn set_hashes(&self, hashes: Vec<(SegmentId, String)>) -> Result<(), DbError> {
        if hashes.is_empty() {
            return Ok(());
        }
        run!(self, writer, seals::set_hashes(&hashes))
    }

    /// The file of a segment is not what it was sealed as.
    pub async fn call_suspect(&self, segment: SegmentId) -> Result<(), DbError> {
        run!(self, writer, seals::call_suspect(&segment))
    }

    /// Finished files of this server that have no hash yet: so many of those behind a segment's id.
    pub async fn without_hash(&self, formats: Vec<&'static str>, after: String, limit: i64) -> Result<Vec<SegmentInContext>, DbError> {
        let host = self.host();
        run!(self, reader, seals::without_hash(&formats, &after, limit, &host))
    }

    /// Resolves when segments have ended since it was last asked. For one who waits.
    pub async fn segments_ended(&self) {
        self.inner.segments_ended.notified().await;
    }

    /// Wakes whoever waits for [`Store::segments_ended`].
    pub fn note_segments_ended(&self) {
        self.inner.segments_ended.notify_one();
    }

    /// Segments of a format that an earlier run of this server left open.
    pub async fn interrupted_segments(&self, format: &'static str) -> Result<Vec<SegmentInContext>, DbError> {
        let host = self.host();
        run!(self, reader, seals::open(format, &host))
    }

    /// Ends segments in one transaction. Those that have ended stay as they are.
    pub async fn close_segments(&self, closed: Vec<ClosedSegment>) -> Result<(), DbError> {
        run!(self, writer, seals::close_all(&closed))?;
        self.note_segments_ended();
        Ok(())
    }

    /// Ends recordings that an earlier run left open, in one transaction.
    pub async fn close_crashed_recordings(&self, recordings: Vec<RecordingId>) -> Result<(), DbError> {
        run!(self, writer, seals::close_recordings(&recordings))
    }

    /// Which of these files have a row. Paths are below the format's directory.
    pub async fn paths_with_rows(&self, format: &'static str, paths: Vec<String>) -> Result<Vec<String>, DbError> {
        run!(self, reader, seals::with_rows(format, &paths))
    }

    /// Segments of this server and where their files are: so many of those behind a segment's id.
    pub async fn segment_files(&self, format: &'static str, after: String, limit: i64) -> Result<Vec<(String, String)>, DbError> {
        let host = self.host();
        run!(self, reader, seals::files(format, &after, limit, &host))
    }

    /// How many files were recovered, and how many are suspect.
    pub async fn doubtful_files(&self) -> Result<(i64, i64), DbError> {
        run!(self, reader, seals::doubtful())
    }
}
