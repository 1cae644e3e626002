//! The recording edge: one append in flight, nothing lost by failures, and a bounded spool behind a slow disk.

use std::sync::Mutex;

use super::*;
use crate::audio::window::GroupLimits;
use crate::recording::pipeline_log::PipelineLog;
use crate::recording::root::Root;

/// What the probe writer is asked, and how it may answer.
type Question = (Vec<Piece>, oneshot::Sender<Result<Appended, RecordingError>>);
type Asked = tokio::sync::mpsc::UnboundedReceiver<Question>;

/// Makes the actor panic, for the tests of its supervision.
impl Handler<crate::actors::wav_writer::Panic> for BufferActor {
    type Result = ();

    fn handle(&mut self, _: crate::actors::wav_writer::Panic, _: &mut Context<Self>) {
        panic!("as asked");
    }
}

/// Waits for the file as if it had come.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Queue(pub Piece);

impl Handler<Queue> for BufferActor {
    type Result = ();

    fn handle(&mut self, Queue(piece): Queue, ctx: &mut Context<Self>) {
        self.spool.push(piece, Instant::now(), Utc::now());
        self.append_next(ctx);
    }
}

/// A writer that answers when the test says so.
struct ProbeWriter(tokio::sync::mpsc::UnboundedSender<Question>);

impl Actor for ProbeWriter {
    type Context = Context<Self>;
}

impl Handler<AppendAudio> for ProbeWriter {
    type Result = ResponseFuture<Result<Appended, RecordingError>>;

    fn handle(&mut self, msg: AppendAudio, _: &mut Context<Self>) -> Self::Result {
        let (answer, answered) = oneshot::channel();
        self.0.send((msg.pieces.to_vec(), answer)).expect("the test listens");
        Box::pin(async move { answered.await.expect("the test answers") })
    }
}

/// Counts what its supervisor would hear.
struct ProbeTrack(Arc<Mutex<Vec<String>>>);

impl Actor for ProbeTrack {
    type Context = Context<Self>;
}

impl Handler<WriterFailed> for ProbeTrack {
    type Result = ();

    fn handle(&mut self, msg: WriterFailed, _: &mut Context<Self>) {
        self.0.lock().expect("unpoisoned").push(format!("failed {} {}", msg.generation, msg.error));
    }
}

impl Handler<SegmentFull> for ProbeTrack {
    type Result = ();

    fn handle(&mut self, msg: SegmentFull, _: &mut Context<Self>) {
        self.0.lock().expect("unpoisoned").push(format!("{:?} {}", msg.reason, msg.generation));
    }
}

struct Bench {
    buffer: Addr<BufferActor>,
    asked: Asked,
    writer: Addr<ProbeWriter>,
    heard: Arc<Mutex<Vec<String>>>,
    stats: Arc<TrackStats>,
    budget: Arc<SpoolBudget>,
    clock_start: Instant,
    pushed: u64,
    written: u64,
    _dir: tempfile::TempDir,
    _alive: watch::Sender<()>,
}

fn bench(spool_bytes: u64, limit_bytes: u64) -> Bench {
    bench_of(spool_bytes, limit_bytes, MuteMode::Keep)
}

fn bench_of(spool_bytes: u64, limit_bytes: u64, mute: MuteMode) -> Bench {
    let dir = tempfile::tempdir().expect("a directory");
    let log = PipelineLog::start(Root::open(dir.path()).expect("a root")).expect("a thread").of_track("RM", None, None);
    let (ask, asked) = tokio::sync::mpsc::unbounded_channel();
    let writer = ProbeWriter(ask).start();
    let heard = Arc::default();
    let track = ProbeTrack(Arc::clone(&heard)).start();
    let stats = Arc::new(TrackStats::new(PcmFormat::LIVEKIT, Arc::default()));
    let budget = Arc::new(SpoolBudget::new(1 << 20));
    let (clock, clock_start) = (Clock::start(), Instant::now());
    let (alive, lifeline) = watch::channel(());
    let buffer = BufferActor::new(BufferParams {
        format: PcmFormat::LIVEKIT,
        grouper: Grouper::new(PcmFormat::LIVEKIT, GroupLimits { seconds: 2.0, bytes: 1 << 20 }, false, false),
        normalize: false,
        taker: Taker::Nobody("a test"),
        log,
        mute,
        spool_bytes,
        clock,
        longest_fill: Duration::from_secs(300),
        pulse: DiskPulse::of(Root::open(&std::env::temp_dir()).expect("a root")),
        budget: Arc::clone(&budget),
        stats: Arc::clone(&stats),
        writer: UseWriter { writer: writer.clone().recipient(), generation: 0, limit_bytes },
        writer_failed: track.clone().recipient(),
        segment_full: track.recipient(),
        lifeline,
    })
    .start();
    Bench { buffer, asked, writer, heard, stats, budget, clock_start, pushed: 0, written: 0, _dir: dir, _alive: alive }
}

impl Bench {
    async fn push(&self, byte: u8, bytes: usize) {
        self.push_at(Instant::now(), byte, bytes).await;
    }

    async fn push_at(&self, read: Instant, byte: u8, bytes: usize) {
        let audio = Bytes::from(vec![byte; bytes]);
        self.buffer.send(PushAudio { audio, arrived: read, read, arrived_at: Utc::now() }).await.expect("alive");
    }

    /// Audio at its own pace from a moment on, all acknowledged; returns the pieces other than audio, with the bytes written before each.
    async fn flow(&mut self, start: Duration, seconds: u64) -> Vec<(u64, Piece)> {
        let mut holes = Vec::new();
        for batch in 0..seconds * 10 {
            self.push_at(self.clock_start + start + Duration::from_millis(100 * (batch + 1)), 1, 19_200).await;
            self.pushed += 19_200;
            while self.written < self.pushed + 4 * self.stats.filled_frames.load(Relaxed) {
                let (pieces, answer) = self.next().await;
                for piece in pieces {
                    let bytes = piece.file_bytes();
                    if !matches!(piece, Piece::Audio(_)) {
                        holes.push((self.written, piece));
                    }
                    self.written += bytes;
                }
                answer.send(appended(self.written)).expect("awaited");
            }
        }
        holes
    }

    async fn next(&mut self) -> Question {
        tokio::time::timeout(Duration::from_secs(20), self.asked.recv()).await.expect("an append in time").expect("a writer")
    }

    fn heard(&self) -> Vec<String> {
        self.heard.lock().expect("unpoisoned").clone()
    }
}

fn audio(byte: u8, bytes: usize) -> Piece {
    Piece::Audio(Bytes::from(vec![byte; bytes]))
}

fn appended(segment_bytes: u64) -> Result<Appended, RecordingError> {
    Ok(Appended { segment_bytes, gaps: 0 })
}

#[actix_rt::test]
async fn one_append_is_in_flight_and_the_next_takes_all_that_waits() {
    let mut bench = bench(1 << 20, 1 << 30);
    for byte in 1..=3 {
        bench.push(byte, 400).await;
    }
    let (pieces, answer) = bench.next().await;
    assert_eq!(pieces, [audio(1, 400)]);
    assert!(bench.asked.try_recv().is_err(), "nothing else before the answer");
    answer.send(appended(400)).expect("awaited");
    let (pieces, answer) = bench.next().await;
    assert_eq!(pieces, [audio(2, 400), audio(3, 400)]);
    answer.send(appended(1_200)).expect("awaited");
    bench.buffer.send(FinishBuffer).await.expect("drained");
    assert_eq!(bench.stats.recorded_bytes.load(Relaxed), 1_200);
    assert_eq!(bench.budget.used_bytes(), 0);
}

#[actix_rt::test]
async fn what_the_spool_cannot_hold_becomes_a_hole_of_its_length_and_is_counted() {
    let mut bench = bench(1_000, 1 << 30);
    for byte in 1..=4 {
        bench.push(byte, 400).await;
    }
    let (pieces, answer) = bench.next().await;
    assert_eq!(pieces, [audio(1, 400)]);
    answer.send(appended(400)).expect("awaited");
    let (pieces, answer) = bench.next().await;
    assert_eq!(pieces, [audio(2, 400), Piece::Lost(800)]);
    answer.send(appended(1_600)).expect("awaited");
    bench.push(5, 400).await;
    let (pieces, _answer) = bench.next().await;
    assert_eq!(pieces, [audio(5, 400)], "there is room again");
    assert_eq!(bench.stats.lost_bytes.load(Relaxed), 800);
}

#[actix_rt::test]
async fn the_budget_of_all_tracks_bounds_one_too() {
    let mut bench = bench(1 << 24, 1 << 30);
    bench.push(1, 1 << 19).await;
    bench.push(2, 1 << 19).await;
    bench.push(3, 4).await;
    let (_, answer) = bench.next().await;
    answer.send(appended(1 << 19)).expect("awaited");
    let (pieces, _answer) = bench.next().await;
    assert_eq!(pieces, [audio(2, 1 << 19), Piece::Lost(4)]);
}

#[actix_rt::test]
async fn a_failed_append_goes_to_the_next_writer_as_it_was() {
    let mut bench = bench(1 << 20, 1 << 30);
    bench.push(1, 400).await;
    let (_, answer) = bench.next().await;
    answer.send(Err(RecordingError::Io(std::io::Error::other("broken")))).expect("awaited");
    bench.push(2, 400).await;
    let next = UseWriter { writer: bench.writer.clone().recipient(), generation: 1, limit_bytes: 1 << 30 };
    bench.buffer.send(next).await.expect("alive");
    let (pieces, answer) = bench.next().await;
    assert_eq!(pieces, [audio(1, 400)]);
    answer.send(appended(400)).expect("awaited");
    let (pieces, _answer) = bench.next().await;
    assert_eq!(pieces, [audio(2, 400)]);
    assert_eq!(bench.heard(), ["failed 0 a recording cannot be written: broken"]);
}

#[actix_rt::test]
async fn what_a_dead_writer_had_in_hand_goes_to_the_next_though_that_came_first() {
    let mut bench = bench(1 << 20, 1 << 30);
    bench.push(1, 400).await;
    let (_, answer) = bench.next().await;
    let next = UseWriter { writer: bench.writer.clone().recipient(), generation: 1, limit_bytes: 1 << 30 };
    bench.buffer.send(next).await.expect("alive");
    answer.send(Err(RecordingError::WriterLost)).expect("awaited");
    let (pieces, answer) = bench.next().await;
    assert_eq!(pieces, [audio(1, 400)]);
    answer.send(appended(400)).expect("awaited");
    bench.buffer.send(FinishBuffer).await.expect("drained");
    assert!(bench.heard().is_empty(), "nobody is asked for a third");
}

#[actix_rt::test]
async fn a_full_disk_is_no_failure_and_is_tried_again_with_the_same_audio() {
    let mut bench = bench(1 << 20, 1 << 30);
    bench.push(1, 400).await;
    for _ in 0..2 {
        let (pieces, answer) = bench.next().await;
        assert_eq!(pieces, [audio(1, 400)]);
        let full = RecordingError::NotNow { what: "no space is left", cause: std::io::Error::other("full") };
        answer.send(Err(full)).expect("awaited");
    }
    let (_, answer) = bench.next().await;
    answer.send(appended(400)).expect("awaited");
    bench.buffer.send(FinishBuffer).await.expect("drained");
    assert!(bench.heard().is_empty());
}

#[actix_rt::test]
async fn f11_a_file_at_its_limit_is_followed_by_the_next_with_the_same_audio() {
    let mut bench = bench(1 << 20, 1 << 30);
    bench.push(1, 400).await;
    let (_, answer) = bench.next().await;
    answer.send(Err(RecordingError::TooLarge(std::io::ErrorKind::FileTooLarge.into()))).expect("awaited");
    let next = UseWriter { writer: bench.writer.clone().recipient(), generation: 1, limit_bytes: 1 << 30 };
    bench.push(2, 400).await;
    bench.buffer.send(next).await.expect("alive");
    let (pieces, answer) = bench.next().await;
    assert_eq!(pieces, [audio(1, 400)]);
    answer.send(appended(400)).expect("awaited");
    bench.next().await.1.send(appended(800)).expect("awaited");
    bench.buffer.send(FinishBuffer).await.expect("drained");
    assert_eq!(bench.heard(), ["Rotated 0"], "a rotation, and no failure");
}

#[actix_rt::test]
async fn audio_that_its_track_leaves_in_the_spool_is_counted_as_lost() {
    let mut bench = bench(1 << 20, 1 << 30);
    bench.push(1, 400).await;
    let (_, _unanswered) = bench.next().await;
    bench.push(2, 200).await;
    bench.buffer.send(crate::actors::wav_writer::Panic).await.expect_err("it dies");
    while bench.budget.used_bytes() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!((bench.stats.lost_bytes.load(Relaxed), bench.stats.totals().lost_bytes.get()), (600, 600));
}

#[actix_rt::test]
async fn a_full_segment_is_told_when_more_comes() {
    let mut bench = bench(1 << 20, 400);
    bench.push(1, 400).await;
    let (_, answer) = bench.next().await;
    answer.send(appended(400)).expect("awaited");
    bench.push(2, 400).await;
    let next = UseWriter { writer: bench.writer.clone().recipient(), generation: 1, limit_bytes: 400 };
    bench.buffer.send(next).await.expect("alive");
    let (pieces, answer) = bench.next().await;
    assert_eq!(pieces, [audio(2, 400)]);
    answer.send(appended(400)).expect("awaited");
    bench.buffer.send(FinishBuffer).await.expect("drained: a track that ends with its segment needs no other");
    assert_eq!(bench.heard(), ["Rotated 0"]);
}

#[actix_rt::test]
async fn what_waits_of_a_muted_tracks_batch_holds_no_more_memory_than_it_counts() {
    /// A batch, and whether anybody holds it.
    struct Held(Vec<u8>, #[expect(dead_code, reason = "it is counted")] Arc<()>);

    impl AsRef<[u8]> for Held {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }

    let mut bench = bench_of(1 << 20, 1 << 30, MuteMode::Pause);
    bench.push(1, 400).await;
    let (_, answer) = bench.next().await;
    bench.buffer.send(SetMuted(true)).await.expect("alive");
    let (batch, held) = ([vec![2; 1_920], vec![0; 3_840], vec![3; 3_840]].concat(), Arc::new(()));
    let (now, batch) = (Instant::now(), Bytes::from_owner(Held(batch, Arc::clone(&held))));
    bench.buffer.send(PushAudio { audio: batch, arrived: now, read: now, arrived_at: Utc::now() }).await.expect("alive");
    assert_eq!((bench.stats.spooled_bytes.load(Relaxed), Arc::strong_count(&held)), (400 + 1_920 + 3_840, 1));
    answer.send(appended(400)).expect("awaited");
    let (pieces, _answer) = bench.next().await;
    assert_eq!(pieces, [audio(2, 1_920), Piece::Muted(3_840), audio(3, 3_840)]);
}

#[actix_rt::test]
async fn t1_what_a_sender_left_out_is_put_in_where_it_was_missing() {
    let mut bench = bench(1 << 20, 1 << 30);
    assert_eq!(bench.flow(Duration::ZERO, 3).await, []);
    // 2 s of nothing, and then its own pace.
    let holes = bench.flow(Duration::from_secs(5), 4).await;
    let [(written, Piece::Missing { bytes, behind })] = holes[..] else { panic!("{holes:?}") };
    assert_eq!((bytes, written - behind), (2 * 192_000, 3 * 192_000), "as long as the pause, and where it was");
    assert!((192_000..300_000).contains(&behind), "{behind} bytes came until it was sure");
    assert_eq!(bench.stats.filled_frames.load(Relaxed), 96_000);
    assert_eq!(bench.flow(Duration::from_secs(9), 2).await, []);
}

#[actix_rt::test]
async fn t1_each_of_two_pauses_is_filled_in_its_place() {
    let mut bench = bench(1 << 20, 1 << 30);
    assert_eq!(bench.flow(Duration::ZERO, 3).await, []);
    assert_eq!(bench.flow(Duration::from_secs(5), 1).await, [], "too little to be sure of the first");
    let holes = bench.flow(Duration::from_secs(8), 4).await;
    let [(first, Piece::Missing { bytes: 384_000, behind }), (second, Piece::Missing { bytes: 384_000, behind: after })] = holes[..] else {
        panic!("{holes:?}")
    };
    assert_eq!((first - behind, second - after), (3 * 192_000, 6 * 192_000));
    assert_eq!(bench.flow(Duration::from_secs(12), 2).await, []);
}

#[actix_rt::test]
async fn a_long_silence_is_not_filled_but_begins_another_segment() {
    let mut bench = bench(1 << 20, 1 << 30);
    bench.flow(Duration::ZERO, 3).await;
    bench.push_at(bench.clock_start + Duration::from_secs(400), 2, 400).await;
    let next = UseWriter { writer: bench.writer.clone().recipient(), generation: 1, limit_bytes: 1 << 30 };
    bench.buffer.send(next).await.expect("alive");
    let (pieces, _answer) = bench.next().await;
    assert_eq!((pieces, bench.heard()), (vec![audio(2, 400)], vec!["Gap 0".to_owned()]));
}
