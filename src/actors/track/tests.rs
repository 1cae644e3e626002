//! Supervision: what dies, what goes on, and what is kept.

mod holes;

use std::path::PathBuf;

use tempfile::TempDir;
use tokio::sync::mpsc;

use super::children::ChildKind;
use super::video::VideoArrived;
use super::*;
use crate::actors::buffer::budget::SpoolBudget;
use crate::actors::session_registry::{SessionRegistry, TrackEnding};
use crate::actors::wav_writer::Panic;
use crate::analysis::connection::AnalysisService;
use crate::analysis::gate::CredentialGate;
use crate::analysis::hume_legacy::HumeLegacy;
use crate::clock::Clock;
use crate::config::{Config, DatabaseUrl, RecordingConfig, Secret};
use crate::db::Store;
use crate::db::rows::{Page, RecordingRow, SegmentRow};
use crate::ids::{MeetingId, RoomName, SegmentId, TrackSid};
use crate::journal::rows::OpenedSegment;
use crate::journal::{Journal, replay};
use crate::recording::append_pool::AppendPool;
use crate::recording::ivf::Unframer;
use crate::recording::path::SegmentName;
use crate::recording::pipeline_log::PipelineLog;
use crate::recording::pulse::DiskPulse;
use crate::recording::root::Root;
use crate::recording::segment_file::{Piece, SegmentFile};
use crate::recording::syncer::Syncer;
use crate::recording::video_stream::Arrival;
use crate::watchdog::Watchdog;

/// Makes a child, or the track itself, panic.
#[derive(Message)]
#[rtype(result = "()")]
struct PanicIn(Victim);

#[derive(Clone, Copy)]
enum Victim {
    Child(ChildKind),
    Track,
}

impl Handler<PanicIn> for TrackActor {
    type Result = ();

    fn handle(&mut self, PanicIn(victim): PanicIn, _: &mut Context<Self>) {
        if let (Victim::Child(ChildKind::VideoWriter), Some(video)) = (victim, &self.video) {
            return video.writer.addr().do_send(Panic);
        }
        let children = self.children.as_ref().expect("children");
        match victim {
            Victim::Track | Victim::Child(ChildKind::VideoWriter) => panic!("as asked"),
            Victim::Child(ChildKind::Buffer) => children.buffer.addr().do_send(Panic),
            Victim::Child(ChildKind::Writer) => children.writer.addr().do_send(Panic),
            Victim::Child(ChildKind::Analysis) => {
                if let Some(analysis) = &children.analysis {
                    analysis.addr().do_send(Panic);
                }
            }
        }
    }
}

/// Hears which tracks have ended.
struct Probe(mpsc::UnboundedSender<ConnectionId>);

impl Actor for Probe {
    type Context = Context<Self>;
}

impl Handler<TrackEnded> for Probe {
    type Result = ();

    fn handle(&mut self, msg: TrackEnded, _: &mut Context<Self>) {
        self.0.send(msg.connection).expect("the test listens");
    }
}

impl Handler<TrackEnding> for Probe {
    type Result = ();

    fn handle(&mut self, _: TrackEnding, _: &mut Context<Self>) {}
}

/// A store, directories, and what tracks share.
struct Stage {
    dir: TempDir,
    resources: Arc<TrackResources>,
    registry: Addr<SessionRegistry>,
    probe: Addr<Probe>,
    ended: mpsc::UnboundedReceiver<ConnectionId>,
}

/// One track, and all that was sent to it.
struct Track {
    addr: Addr<TrackActor>,
    stats: Arc<TrackStats>,
    sent: Vec<u8>,
}

fn identity(sid: &str) -> TrackIdentity {
    TrackIdentity {
        meeting: MeetingId::new("RM"),
        room: RoomName::new("room"),
        participant: None,
        track: Some(TrackSid::new(sid)),
        session_started_at: None,
    }
}

impl Stage {
    async fn set() -> Self {
        Self::set_with(Config::default().recording.segment_duration).await
    }

    async fn set_with(segment_duration: Duration) -> Self {
        let dir = TempDir::new().expect("a directory");
        let config = Config::default();
        let store = Store::open(&DatabaseUrl::Sqlite(dir.path().join("test.db")), 1).await.expect("a store");
        let service = AnalysisService {
            wire: Arc::new(HumeLegacy),
            // Nobody is there: the actor lives, waits and tries again.
            url: "ws://127.0.0.1:9/".to_owned(),
            key: Secret::new("key"),
            tls: crate::analysis::tls::client_config(None).expect("TLS"),
            gate: Arc::new(CredentialGate::new(Duration::from_secs(1))),
            queue: Duration::from_secs(30),
        };
        let journal = Journal::open(dir.path(), 1 << 20).expect("a journal");
        let resources = TrackResources {
            root: Root::open(&dir.path().join("audio")).expect("a root"),
            totals: Arc::default(),
            video_root: Root::open(&dir.path().join("video")).expect("a root"),
            ingest: config.ingest,
            recording: RecordingConfig { segment_duration, ..config.recording },
            analysis: config.analysis,
            pipeline_log: PipelineLog::start(Root::open(dir.path()).expect("a root")).expect("a thread"),
            lag: Arc::default(),
            budget: Arc::new(SpoolBudget::new(1 << 26)),
            video_budget: Arc::new(SpoolBudget::new(1 << 26)),
            syncer: Syncer::start().expect("threads"),
            append_pool: AppendPool::start().expect("threads"),
            watchdog: Watchdog::default(),
            pulse: DiskPulse::of(Root::open(&dir.path().join("audio")).expect("a root")),
            video_pulse: DiskPulse::of(Root::open(&dir.path().join("video")).expect("a root")),
            service: Service::Streaming(service),
            store: store.clone(),
            journal: journal.clone(),
        };
        // What a slow disk sends to the journal follows, as in a server.
        actix_rt::spawn(replay::run(journal.clone(), store.clone(), Box::new(|_| Box::pin(async {}))));
        let (told, ended) = mpsc::unbounded_channel();
        let registry = SessionRegistry::new(store, journal, Duration::from_secs(5)).start();
        Self { dir, resources: Arc::new(resources), registry, probe: Probe(told).start(), ended }
    }

    async fn track(&self, sid: &str) -> Track {
        self.launch(sid, TrackStats::new(PcmFormat::LIVEKIT, Arc::default()), None).await
    }

    async fn video_track(&self, sid: &str) -> Track {
        self.launch(sid, TrackStats::of_video(VideoCodec::Vp8, Arc::default()), Some(VideoCodec::Vp8)).await
    }

    async fn launch(&self, sid: &str, stats: TrackStats, video: Option<VideoCodec>) -> Track {
        let identity = identity(sid);
        let stats = Arc::new(stats);
        let reserve = crate::actors::session_registry::ReserveTrack {
            identity: identity.clone(),
            ticket: None,
            stats: Arc::clone(&stats),
            peer: String::new(),
        };
        let connection = self.registry.send(reserve).await.expect("alive").expect("let in");
        let addr = TrackActor::launch(TrackParams {
            connection,
            identity,
            ticket: None,
            format: stats.format(),
            from_livekit: true,
            group_seconds: 2.0,
            analyse: true,
            mix: None,
            clock: Clock::start(),
            video,
            stats: Arc::clone(&stats),
            resources: Arc::clone(&self.resources),
            ending: self.probe.clone().recipient(),
            registry: self.probe.clone().recipient(),
        });
        Track { addr, stats, sent: Vec::new() }
    }

    /// The recording of a track with its segments, once `ready` likes them.
    async fn rows(&self, sid: &str, ready: impl Fn(&[SegmentRow]) -> bool) -> (RecordingRow, Vec<SegmentRow>) {
        let store = &self.resources.store;
        let seen = std::cell::RefCell::new(String::new());
        let find = async {
            loop {
                let page = Page { limit: 100, after: None };
                let recordings = store.recordings(None, page).await.expect("rows");
                if let Some(recording) = recordings.into_iter().find(|row| row.track_sid.as_deref() == Some(sid)) {
                    let segments = store.segments_of(vec![recording.id.clone()]).await.expect("rows");
                    seen.replace(format!("{recording:?} {segments:?}"));
                    if !segments.is_empty() && ready(&segments) {
                        return (recording, segments);
                    }
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), find)
            .await
            .unwrap_or_else(|_| panic!("{} {:?}", seen.borrow(), self.resources.journal.figures()))
    }

    /// The pictures of segments, joined.
    fn video(&self, segments: &[SegmentRow]) -> Vec<u8> {
        let pictures = |segment: &SegmentRow| {
            let file = std::fs::read(self.dir.path().join("video").join(&segment.path)).expect("a file");
            Unframer::default().push(&file).expect("IVF").into_iter().flat_map(|picture| picture.data)
        };
        segments.iter().flat_map(pictures).collect()
    }

    /// The PCM of segments, joined.
    fn audio(&self, segments: &[SegmentRow]) -> Vec<u8> {
        let path = |segment: &SegmentRow| -> PathBuf { self.dir.path().join("audio").join(&segment.path) };
        let pcm = |segment| {
            hound::WavReader::open(path(segment)).expect("a WAV file").into_samples::<i16>().flat_map(|s| s.expect("a sample").to_le_bytes())
        };
        segments.iter().flat_map(pcm).collect()
    }
}

impl Track {
    async fn send(&mut self, bytes: usize) {
        let start = self.sent.len();
        let audio: Vec<u8> = (start..start + bytes).map(|n| (n % 249) as u8 + 1).collect();
        self.sent.extend(&audio);
        let message = AudioArrived { audio: audio.into(), arrived: Instant::now(), read: Instant::now(), arrived_at: Utc::now() };
        self.addr.send(message).await.expect("the track lives");
    }

    /// Pictures that build on others, each of its own length and content.
    async fn send_pictures(&mut self, count: u8) {
        for picture in 0..count {
            let message = vec![0x11 | picture << 4; 100 + usize::from(picture)];
            self.sent.extend(&message);
            let arrival = Arrival { at: Instant::now(), wall: Utc::now() };
            self.addr.send(VideoArrived { message: message.into(), arrival }).await.expect("the track lives");
        }
    }

    async fn until_written(&self) {
        self.until("all is written", |stats| stats.recorded_bytes.load(Relaxed) == self.sent.len() as u64).await;
    }

    async fn until(&self, what: &str, condition: impl Fn(&TrackStats) -> bool) {
        let wait = async {
            while !condition(&self.stats) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap_or_else(|_| panic!("{what}: {:?}", self.stats));
    }

    async fn kill(&self, kind: ChildKind) {
        self.addr.send(PanicIn(Victim::Child(kind))).await.expect("the track lives");
    }

    async fn finish(&self) {
        self.addr.send(FinishTrack { reason: EndReason::Closed }).await.expect("the track lives");
    }
}

fn reasons(segments: &[SegmentRow]) -> Vec<&str> {
    segments.iter().map(|segment| segment.end_reason.as_deref().unwrap_or("open")).collect()
}

#[actix_rt::test]
async fn a_dead_writer_is_replaced_and_no_sample_is_lost() {
    let stage = Stage::set().await;
    let mut track = stage.track("TR_1").await;
    track.send(40_000).await;
    track.until_written().await;
    track.kill(ChildKind::Writer).await;
    track.send(40_000).await;
    track.until("it is restarted", |stats| stats.writer_restarts.load(Relaxed) == 1).await;
    stage.rows("TR_1", |segments| segments[0].end_reason.as_deref() == Some("failed")).await;
    track.send(20_000).await;
    track.finish().await;
    let (recording, segments) = stage.rows("TR_1", |segments| segments.len() == 2 && segments.iter().all(|s| s.end_reason.is_some())).await;
    assert_eq!(reasons(&segments), ["failed", "closed"]);
    assert_eq!(stage.audio(&segments), track.sent);
    assert_eq!(segments.iter().map(|segment| segment.bytes).collect::<Vec<_>>(), [40_000, 60_000]);
    assert!(recording.ended_at.is_some());
}

#[actix_rt::test]
async fn a_track_whose_writers_keep_dying_is_given_up_and_no_other_is_touched() {
    let mut stage = Stage::set().await;
    let (mut bad, mut good) = (stage.track("TR_BAD").await, stage.track("TR_GOOD").await);
    for restarts in 1..=5 {
        bad.send(4_000).await;
        good.send(4_000).await;
        bad.until_written().await;
        bad.kill(ChildKind::Writer).await;
        bad.until("it is restarted", |stats| stats.writer_restarts.load(Relaxed) == restarts).await;
    }
    bad.send(4_000).await;
    bad.until_written().await;
    bad.kill(ChildKind::Writer).await;
    let ended = tokio::time::timeout(Duration::from_secs(20), stage.ended.recv()).await.expect("it ends");
    assert_eq!(ended.expect("told").to_string(), "1", "the first connection is the bad one");
    let (_, segments) = stage.rows("TR_BAD", |segments| segments.len() == 6 && segments.iter().all(|s| s.end_reason.is_some())).await;
    assert_eq!(stage.audio(&segments), bad.sent, "everything until its end is kept");
    good.send(4_000).await;
    good.finish().await;
    let (_, segments) = stage.rows("TR_GOOD", |segments| segments.iter().all(|s| s.end_reason.is_some())).await;
    assert_eq!((reasons(&segments), stage.audio(&segments)), (vec!["closed"], good.sent.clone()));
}

#[actix_rt::test]
async fn a_dying_analysis_is_restarted_and_then_given_up_and_the_recording_never_notices() {
    let stage = Stage::set().await;
    let mut track = stage.track("TR_1").await;
    for restarts in 1..=5 {
        track.send(19_200).await;
        track.kill(ChildKind::Analysis).await;
        track.until("it is restarted", |stats| stats.analysis_restarts.load(Relaxed) == restarts).await;
    }
    track.kill(ChildKind::Analysis).await;
    track.send(19_200).await;
    track.finish().await;
    let (_, segments) = stage.rows("TR_1", |segments| segments.iter().all(|s| s.end_reason.is_some())).await;
    assert_eq!((reasons(&segments), stage.audio(&segments)), (vec!["closed"], track.sent.clone()));
    assert_eq!(track.stats.analysis_restarts.load(Relaxed), 5);
}

#[actix_rt::test]
async fn a_dead_buffer_fails_its_track_and_what_was_written_is_sealed() {
    let mut stage = Stage::set().await;
    let mut track = stage.track("TR_1").await;
    track.send(40_000).await;
    track.until_written().await;
    track.kill(ChildKind::Buffer).await;
    tokio::time::timeout(Duration::from_secs(20), stage.ended.recv()).await.expect("it ends");
    let (_, segments) = stage.rows("TR_1", |segments| segments.iter().all(|s| s.end_reason.is_some())).await;
    assert_eq!((reasons(&segments), stage.audio(&segments)), (vec!["failed"], track.sent.clone()));
}

#[actix_rt::test]
async fn a_dead_track_is_told_to_the_registry_and_its_row_is_closed_by_the_file() {
    let mut stage = Stage::set().await;
    let mut track = stage.track("TR_1").await;
    track.send(40_000).await;
    track.until_written().await;
    // What the buffer still holds is kept too.
    track.send(4_000).await;
    track.addr.send(PanicIn(Victim::Track)).await.expect_err("it dies of it");
    tokio::time::timeout(Duration::from_secs(20), stage.ended.recv()).await.expect("told");
    let (_, segments) = stage.rows("TR_1", |segments| segments.iter().all(|s| s.end_reason.is_some())).await;
    let ended = async {
        while stage.rows("TR_1", |_| true).await.0.ended_at.is_none() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), ended).await.expect("the recording ends too");
    assert_eq!((reasons(&segments), stage.audio(&segments)), (vec!["failed"], track.sent.clone()));
    assert_eq!(segments[0].frames, 11_000);
}

#[actix_rt::test]
async fn i8_a_file_that_a_dead_writer_still_holds_gets_its_row_closed_once_it_is_free() {
    let stage = Stage::set().await;
    let TrackResources { root, syncer, store, journal, watchdog, .. } = &*stage.resources;
    let (name, first) =
        (SegmentName { meeting: "RM".into(), room: "room".into(), participant: None, track: None }, [Piece::Audio(vec![1; 4_000].into())]);
    let file = SegmentFile::create(root, &name, Utc::now(), PcmFormat::LIVEKIT, &first, syncer).expect("a segment");
    let path = file.relative_path().to_string_lossy().into_owned();
    let (told, _spent) = oneshot::channel();
    let rows = RowLog::start(store.clone(), journal.clone(), root.clone(), identity("TR_1"), None, told, watchdog);
    rows.segment_opened(OpenedSegment { id: SegmentId::fresh(), path, format: PcmFormat::LIVEKIT, started_at: Utc::now() });
    rows.end();
    rows.flushed().await;
    assert_eq!(stage.rows("TR_1", |_| true).await.1[0].end_reason, None, "its length is not known yet");
    drop(rows);
    drop(file);
    let (_, segments) = stage.rows("TR_1", |segments| segments[0].end_reason.is_some()).await;
    assert_eq!((reasons(&segments), segments[0].frames), (vec!["failed"], 1_000));
}

#[actix_rt::test]
async fn i8_a_dead_video_writer_is_replaced_and_no_picture_is_lost() {
    let stage = Stage::set().await;
    let mut track = stage.video_track("TR_1").await;
    track.send_pictures(5).await;
    track.until_written().await;
    track.kill(ChildKind::VideoWriter).await;
    track.until("it is restarted", |stats| stats.writer_restarts.load(Relaxed) == 1).await;
    stage.rows("TR_1", |segments| segments[0].end_reason.as_deref() == Some("failed")).await;
    track.send_pictures(7).await;
    track.finish().await;
    let (recording, segments) = stage.rows("TR_1", |segments| segments.len() == 2 && segments.iter().all(|s| s.end_reason.is_some())).await;
    assert_eq!(reasons(&segments), ["failed", "closed"]);
    assert_eq!(segments.iter().map(|segment| (segment.format.as_str(), segment.frames)).collect::<Vec<_>>(), [("ivf", 5), ("ivf", 7)]);
    assert_eq!(stage.video(&segments), track.sent);
    assert!(recording.ended_at.is_some());
}

#[actix_rt::test]
async fn i8_a_track_whose_video_writers_keep_dying_is_given_up() {
    let mut stage = Stage::set().await;
    let mut track = stage.video_track("TR_1").await;
    for restarts in 1..=6 {
        track.send_pictures(2).await;
        track.until_written().await;
        track.kill(ChildKind::VideoWriter).await;
        if restarts <= 5 {
            track.until("it is restarted", |stats| stats.writer_restarts.load(Relaxed) == restarts).await;
        }
    }
    tokio::time::timeout(Duration::from_secs(20), stage.ended.recv()).await.expect("it ends").expect("told");
    let (_, segments) = stage.rows("TR_1", |segments| segments.len() == 6 && segments.iter().all(|s| s.end_reason.is_some())).await;
    assert_eq!(stage.video(&segments), track.sent, "everything until its end is kept");
}

#[actix_rt::test]
async fn t1_a_sender_whose_clock_drifts_is_told_of_in_the_metrics_the_sidecar_and_the_row() {
    let stage = Stage::set().await;
    let format = PcmFormat { sample_rate: 8_000, channels: 1 };
    let track = stage.launch("TR_1", TrackStats::new(format, Arc::default()), None).await;
    let (start, batch) = (Instant::now(), Bytes::from(vec![0; 8_000]));
    // Eleven minutes of a clock that is slow by 500 ppm, half a second at a time.
    for count in 1..=1_320 {
        let read = start + Duration::from_millis(500).mul_f64(1.0005) * count;
        let message = AudioArrived { audio: batch.clone(), arrived: read, read, arrived_at: Utc::now() };
        track.addr.send(message).await.expect("the track lives");
    }
    track.until("it is told", |stats| stats.totals().drifting.get() == 1).await;
    track.finish().await;
    let (recording, segments) = stage.rows("TR_1", |segments| segments[0].end_reason.is_some()).await;
    let sidecar = std::fs::read(stage.dir.path().join("audio").join(format!("{}.json", segments[0].path))).expect("a sidecar");
    let sidecar: serde_json::Value = serde_json::from_slice(&sidecar).expect("JSON");
    let told = sidecar["driftPpm"].as_f64().expect("a number");
    assert!((-520.0..-480.0).contains(&told), "{told}");
    let seals = stage.resources.store.seals_of(vec![recording.id]).await.expect("rows");
    assert_eq!(seals[&segments[0].id].drift_ppm, Some(told));
    assert_eq!(track.stats.totals().drifting.get(), 1, "once");
}
