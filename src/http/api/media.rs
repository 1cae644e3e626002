//! What can be heard and seen: a recording as one WAV file, whatever its segments, and each segment's file. Video is not joined.
//!
//! Nothing is copied and nothing is kept in memory: each byte of the file has its place in a segment, a gap or the header. A file that grows is
//! served as it is at the request.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use actix_web::body::{self, SizedStream};
use actix_web::http::header::{
    self, ContentDisposition, DispositionParam, DispositionType, EntityTag, HeaderValue, HttpDate, IfMatch, IfModifiedSince, IfNoneMatch, IfRange,
    IfUnmodifiedSince,
};
use actix_web::http::{Method, StatusCode};
use actix_web::{HttpMessage, HttpRequest, HttpResponse, ResponseError, web};
use bytes::Bytes;
use futures_util::{Stream, stream};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::recordings::media_path;
use super::timeline::{blocking, format_of, measured, spans_of};
use crate::actors::track::TrackResources;
use crate::audio::format::PcmFormat;
use crate::db::rows::SegmentRow;
use crate::http::Doors;
use crate::http::error::{ApiError, ErrorCode};
use crate::ids::SegmentId;
use crate::recording::joined::{Joined, Span};
use crate::recording::root::Root;
use crate::recording::segment_reader::{FileReader, JoinedReader};
use crate::video::codec::Container;

/// Says that a file has outgrown RIFF, which not every reader knows.
const WAV_FORMAT: &str = "X-Wav-Format";

/// `GET /api/v1/recordings/{id}/media`: all segments, with silence between them.
pub async fn of_recording(request: HttpRequest, id: web::Path<String>, doors: web::Data<Doors>) -> Result<HttpResponse, ApiError> {
    let segments = doors.store.segments_of(vec![id.into_inner()]).await?;
    if segments.is_empty() {
        return Err(ApiError::not_found("recording"));
    }
    serve(&request, segments, &doors.tracks).await
}

/// `GET /api/v1/segments/{id}/media`
pub async fn of_segment(request: HttpRequest, id: web::Path<String>, doors: web::Data<Doors>) -> Result<HttpResponse, ApiError> {
    let segment = doors.store.segment(SegmentId::new(id.into_inner())).await?.ok_or_else(|| ApiError::not_found("segment"))?;
    serve(&request, vec![segment], &doors.tracks).await
}

async fn serve(request: &HttpRequest, segments: Vec<SegmentRow>, tracks: &Arc<TrackResources>) -> Result<HttpResponse, ApiError> {
    Media::look_up(measured(segments, tracks).await?, tracks).await?.answer(request)
}

/// What is there to be served, as it is in this moment.
struct Media {
    content: Content,
    root: Root,
    /// Those of the segments beneath the root, in the same order.
    files: Vec<PathBuf>,
    validators: Validators,
}

impl Media {
    async fn look_up(segments: Vec<SegmentRow>, tracks: &TrackResources) -> Result<Self, ApiError> {
        let grows = segments.iter().any(|segment| segment.ended_at.is_none());
        let (content, etag) = Content::of(&segments, grows)?;
        let root = tracks.root_of(content.container()).clone();
        let files: Vec<PathBuf> = segments.iter().map(|segment| PathBuf::from(&segment.path)).collect();
        let beneath = root.clone();
        let looked_at = blocking(move || newest(&beneath, &files).map(|newest| (files, newest))).await?;
        let (files, newest) = looked_at.map_err(|error| {
            log::error!("a segment's file cannot be opened error={error}");
            ApiError::not_found("file")
        })?;
        let validators = Validators { etag, modified: (!grows).then(|| whole_seconds(newest)) };
        Ok(Self { content, root, files, validators })
    }

    fn answer(self, request: &HttpRequest) -> Result<HttpResponse, ApiError> {
        let Self { content, root, files, validators } = self;
        let total = content.total_bytes();
        let mut response = HttpResponse::Ok();
        response.insert_header((header::ETAG, validators.etag.to_string()));
        if let Some(modified) = validators.modified {
            response.insert_header((header::LAST_MODIFIED, modified));
        }
        match validators.judge(request) {
            Verdict::Serve => {}
            Verdict::NotModified => return Ok(response.status(StatusCode::NOT_MODIFIED).body(body::None::new())),
            Verdict::Failed => return Err(ApiError::new(ErrorCode::PreconditionFailed, "the file is another by now")),
        }
        let name = files.first().and_then(|first| first.file_name()).map(|name| DispositionParam::Filename(name.to_string_lossy().into_owned()));
        let disposition = ContentDisposition { disposition: DispositionType::Inline, parameters: name.into_iter().collect() };
        response
            .insert_header((header::CONTENT_TYPE, content.container().content_type()))
            .insert_header((header::ACCEPT_RANGES, "bytes"))
            .insert_header(disposition);
        if content.is_rf64() {
            response.insert_header((WAV_FORMAT, "RF64"));
        }
        let range = match asked(request, &validators, total) {
            Asked::Whole => 0..total,
            Asked::Part(range) => {
                let content_range = format!("bytes {}-{}/{total}", range.start, range.end - 1);
                response.status(StatusCode::PARTIAL_CONTENT).insert_header((header::CONTENT_RANGE, content_range));
                range
            }
            Asked::Nothing => {
                let mut refusal = ApiError::new(ErrorCode::RangeNotSatisfiable, "the file has no such bytes").error_response();
                let content_range = HeaderValue::try_from(format!("bytes */{total}")).expect("a header's value");
                refusal.headers_mut().insert(header::CONTENT_RANGE, content_range);
                return Ok(refusal);
            }
        };
        let length = range.end - range.start;
        if request.method() == Method::HEAD {
            return Ok(response.body(SizedStream::new(length, stream::empty::<io::Result<Bytes>>())));
        }
        Ok(response.body(SizedStream::new(length, chunks(content.reader(root, files, range)))))
    }
}

/// What the bytes are.
enum Content {
    Wav(Joined),
    /// One file as it is, of which so many bytes count.
    Video {
        container: Container,
        bytes: u64,
    },
}

impl Content {
    fn of(segments: &[SegmentRow], grows: bool) -> Result<(Self, EntityTag), ApiError> {
        if let [segment] = segments
            && let container = Container::of(&segment.path)
            && container.is_video()
        {
            let bytes = u64::try_from(segment.bytes).unwrap_or(0);
            let digest = Sha256::digest(format!("{} {bytes}", segment.id));
            return Ok((Self::Video { container, bytes }, tag(&digest, grows)));
        }
        let format = common_format(segments)?;
        let spans = spans_of(segments);
        let etag = etag(format, segments, &spans, grows);
        Ok((Self::Wav(Joined::new(format, spans)), etag))
    }

    fn container(&self) -> Container {
        match self {
            Self::Wav(_) => Container::Wav,
            Self::Video { container, .. } => *container,
        }
    }

    fn total_bytes(&self) -> u64 {
        match self {
            Self::Wav(joined) => joined.total_bytes(),
            Self::Video { bytes, .. } => *bytes,
        }
    }

    fn is_rf64(&self) -> bool {
        match self {
            Self::Wav(joined) => joined.is_rf64(),
            Self::Video { .. } => false,
        }
    }

    fn reader(self, root: Root, files: Vec<PathBuf>, range: Range<u64>) -> Reader {
        match self {
            Self::Wav(joined) => Reader::Joined(JoinedReader::new(joined, root, files, range)),
            Self::Video { .. } => Reader::File(FileReader::new(root, files.into_iter().next().unwrap_or_default(), range)),
        }
    }
}

enum Reader {
    Joined(JoinedReader),
    File(FileReader),
}

impl Reader {
    fn next_chunk(&mut self) -> io::Result<Option<Bytes>> {
        match self {
            Self::Joined(joined) => joined.next_chunk(),
            Self::File(file) => file.next_chunk(),
        }
    }
}

/// When the last of the files changed, all of which can be opened.
fn newest(root: &Root, files: &[PathBuf]) -> io::Result<SystemTime> {
    files.iter().try_fold(UNIX_EPOCH, |newest, path| {
        let modified = root.open_file(path).and_then(|file| file.metadata()?.modified());
        let modified = modified.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        Ok(newest.max(modified))
    })
}

/// The bytes, a chunk at a time, each when the connection has taken the one before it.
fn chunks(reader: Reader) -> impl Stream<Item = io::Result<Bytes>> {
    stream::try_unfold(reader, |mut reader| async {
        let read = tokio::task::spawn_blocking(move || reader.next_chunk().map(|chunk| chunk.map(|chunk| (chunk, reader))));
        // The length is promised already: an end before it is how the client learns.
        let read = read.await.map_err(io::Error::other).and_then(|read| read);
        read.inspect_err(|error| log::error!("a file ends before its segment does, or is gone error={error}"))
    })
}

/// The format of all segments.
fn common_format(segments: &[SegmentRow]) -> Result<PcmFormat, ApiError> {
    let links = || json!(segments.iter().map(|segment| media_path(&segment.id)).collect::<Vec<_>>());
    if segments.iter().any(|segment| Container::of(&segment.path).is_video()) {
        let detail = "segments of video are not joined to one file; each has its own media";
        return Err(ApiError::new(ErrorCode::ManySegments, detail).with("segments", links()));
    }
    let mut formats: Vec<PcmFormat> = segments.iter().map(format_of).collect();
    formats.dedup();
    if let [format] = *formats {
        return Ok(format);
    }
    let words: Vec<String> =
        formats.iter().map(|format| format!("{} Hz {}", format.sample_rate, if format.channels == 1 { "mono" } else { "stereo" })).collect();
    let detail =
        format!("the format changes from segment to segment ({}), so they cannot be one file; each has its own media", words.join(", then "));
    Err(ApiError::new(ErrorCode::ManySegments, detail).with("segments", links()))
}

/// Of everything that the bytes follow from. Weak while the file grows: what has not reached the disk may still be lost with it.
fn etag(format: PcmFormat, segments: &[SegmentRow], spans: &[Span], grows: bool) -> EntityTag {
    let mut digest = Sha256::new();
    digest.update(format!("{} {}", format.sample_rate, format.channels));
    for (segment, span) in segments.iter().zip(spans) {
        digest.update(format!(" {} {} {}", segment.id, span.start, span.end));
    }
    tag(&digest.finalize(), grows)
}

fn tag(digest: &[u8], grows: bool) -> EntityTag {
    EntityTag::new(grows, digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect())
}

/// What tells one state of the file from another.
struct Validators {
    etag: EntityTag,
    /// In whole seconds; not told while the file grows, faster than they pass.
    modified: Option<HttpDate>,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Serve,
    NotModified,
    Failed,
}

impl Validators {
    /// The preconditions of a request, in the order of RFC 9110 section 13.2.2.
    fn judge(&self, request: &HttpRequest) -> Verdict {
        let holds = match request.get_header::<IfMatch>() {
            Some(IfMatch::Any) => true,
            Some(IfMatch::Items(tags)) => tags.iter().any(|tag| tag.strong_eq(&self.etag)),
            None => match (request.get_header::<IfUnmodifiedSince>(), self.modified) {
                (Some(IfUnmodifiedSince(since)), Some(modified)) => modified <= since,
                (Some(_), None) | (None, _) => true,
            },
        };
        let known = match request.get_header::<IfNoneMatch>() {
            Some(IfNoneMatch::Any) => true,
            Some(IfNoneMatch::Items(tags)) => tags.iter().any(|tag| tag.weak_eq(&self.etag)),
            None => match (request.get_header::<IfModifiedSince>(), self.modified) {
                (Some(IfModifiedSince(since)), Some(modified)) => modified <= since,
                (Some(_), None) | (None, _) => false,
            },
        };
        match (holds, known) {
            (false, _) => Verdict::Failed,
            (true, true) => Verdict::NotModified,
            (true, false) => Verdict::Serve,
        }
    }

    /// Whether a range is wanted of this very state: without `If-Range`, of any.
    fn allow_range(&self, request: &HttpRequest) -> bool {
        if !request.headers().contains_key(header::IF_RANGE) {
            return true;
        }
        match request.get_header::<IfRange>() {
            Some(IfRange::EntityTag(tag)) => tag.strong_eq(&self.etag),
            Some(IfRange::Date(date)) => self.modified == Some(date),
            None => false,
        }
    }
}

/// As `Last-Modified` can say it.
fn whole_seconds(time: SystemTime) -> HttpDate {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    HttpDate::from(UNIX_EPOCH + Duration::from_secs(since.as_secs()))
}

/// How much of the file a request wants.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Whole,
    /// Not empty.
    Part(Range<u64>),
    /// A range that has no byte of the file.
    Nothing,
}

fn asked(request: &HttpRequest, validators: &Validators, total: u64) -> Asked {
    let ranges: Vec<_> = request.headers().get_all(header::RANGE).collect();
    match ranges.as_slice() {
        [range] if request.method() == Method::GET && validators.allow_range(request) => asked_range(range.to_str().unwrap_or_default(), total),
        _ => Asked::Whole,
    }
}

/// One range of bytes. Whatever else a `Range` may say, or fails to say, is ignored, as RFC 9110 section 14.2 lets us.
fn asked_range(text: &str, total: u64) -> Asked {
    /// Numbers too large for 64 bits are behind every file too.
    fn number(text: &str) -> Option<u64> {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse().unwrap_or(u64::MAX))
    }
    let range = text.split_once('=').filter(|(unit, _)| unit.eq_ignore_ascii_case("bytes")).and_then(|(_, range)| range.trim().split_once('-'));
    let Some((first, last)) = range else { return Asked::Whole };
    let part = match (number(first), number(last)) {
        (Some(first), Some(last)) if first <= last => first..total.min(last.saturating_add(1)),
        (Some(first), None) if last.is_empty() => first..total,
        (None, Some(suffix)) if first.is_empty() => total.saturating_sub(suffix)..total,
        _ => return Asked::Whole,
    };
    if part.is_empty() { Asked::Nothing } else { Asked::Part(part) }
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    #[test]
    fn one_range_is_served_and_whatever_else_is_said_is_ignored() {
        let part = |start, end| Asked::Part(start..end);
        let cases = [
            ("bytes=0-0", part(0, 1)),
            ("bytes=0-", part(0, 100)),
            ("Bytes=10-19", part(10, 20)),
            ("bytes= 10-19", part(10, 20)),
            ("bytes=99-99999999999999999999999", part(99, 100)),
            ("bytes=-1", part(99, 100)),
            ("bytes=-1000", part(0, 100)),
            ("bytes=-99999999999999999999999", part(0, 100)),
            ("bytes=100-", Asked::Nothing),
            ("bytes=100-200", Asked::Nothing),
            ("bytes=99999999999999999999999-", Asked::Nothing),
            ("bytes=-0", Asked::Nothing),
            ("", Asked::Whole),
            ("bytes", Asked::Whole),
            ("bytes=", Asked::Whole),
            ("bytes=-", Asked::Whole),
            ("bytes=5", Asked::Whole),
            ("bytes=9-5", Asked::Whole),
            ("bytes=+1-5", Asked::Whole),
            ("bytes=1--5", Asked::Whole),
            ("bytes=a-b", Asked::Whole),
            ("bytes=0-1,5-6", Asked::Whole),
            ("seconds=0-1", Asked::Whole),
        ];
        for (text, expected) in cases {
            assert_eq!(asked_range(text, 100), expected, "{text:?}");
        }
    }

    #[test]
    fn preconditions_are_those_of_rfc_9110() {
        const BEFORE: &str = "Fri, 20 Nov 2026 10:53:11 GMT";
        const THEN: &str = "Fri, 20 Nov 2026 10:53:12 GMT";
        let modified = whole_seconds(UNIX_EPOCH + Duration::from_millis(1_795_171_992_345));
        assert_eq!(modified.to_string(), THEN);
        let sealed = Validators { etag: EntityTag::new_strong("a".to_owned()), modified: Some(modified) };
        let growing = Validators { etag: EntityTag::new_weak("a".to_owned()), modified: None };
        let cases = [
            (vec![], Verdict::Serve, Verdict::Serve),
            (vec![("If-Match", "\"a\"")], Verdict::Serve, Verdict::Failed),
            (vec![("If-Match", "\"b\", \"a\"")], Verdict::Serve, Verdict::Failed),
            (vec![("If-Match", "\"b\"")], Verdict::Failed, Verdict::Failed),
            (vec![("If-Match", "*"), ("If-Unmodified-Since", BEFORE)], Verdict::Serve, Verdict::Serve),
            (vec![("If-Unmodified-Since", THEN)], Verdict::Serve, Verdict::Serve),
            (vec![("If-Unmodified-Since", BEFORE)], Verdict::Failed, Verdict::Serve),
            (vec![("If-None-Match", "\"a\"")], Verdict::NotModified, Verdict::NotModified),
            (vec![("If-None-Match", "W/\"a\"")], Verdict::NotModified, Verdict::NotModified),
            (vec![("If-None-Match", "\"b\""), ("If-Modified-Since", THEN)], Verdict::Serve, Verdict::Serve),
            (vec![("If-Modified-Since", THEN)], Verdict::NotModified, Verdict::Serve),
            (vec![("If-Modified-Since", BEFORE)], Verdict::Serve, Verdict::Serve),
        ];
        for (headers, of_sealed, of_growing) in cases {
            let request = headers.iter().fold(TestRequest::get(), |request, header| request.insert_header(*header)).to_http_request();
            assert_eq!((sealed.judge(&request), growing.judge(&request)), (of_sealed, of_growing), "{headers:?}");
        }
        for (if_range, of_sealed, of_growing) in [
            ("\"a\"", true, false),
            ("W/\"a\"", false, false),
            ("\"b\"", false, false),
            (THEN, true, false),
            (BEFORE, false, false),
            ("?", false, false),
        ] {
            let request = TestRequest::get().insert_header(("If-Range", if_range)).to_http_request();
            assert_eq!((sealed.allow_range(&request), growing.allow_range(&request)), (of_sealed, of_growing), "{if_range}");
        }
    }
}
