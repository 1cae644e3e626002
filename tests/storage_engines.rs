//! The store's contract: the same cases on SQLite always, and on PostgreSQL where `TEST_POSTGRES_URL` names a server (see `.ci/postgres`).

pub mod engine;
mod fixtures;
mod hang_ups;
mod ledger;
mod measurements;
mod recordings;
mod seals;
mod segments;
mod start_queue;
mod tables;
mod webhooks;

/// Makes a test of each case for each engine, such as `sqlite::events_are_kept_once`.
///
/// All run on an actix thread, as the server's callers do: there a query that is cancelled panics (`docs/FACTS.md`, F13).
macro_rules! contract {
    ($($group:ident :: { $($case:ident),+ $(,)? })+) => {
        mod sqlite {
            $($(
                #[actix_rt::test]
                async fn $case() {
                    super::engine::on_sqlite(super::$group::$case).await;
                }
            )+)+
        }

        mod postgres {
            $($(
                #[actix_rt::test]
                async fn $case() {
                    super::engine::on_postgres(super::$group::$case).await;
                }
            )+)+
        }
    };
}

contract! {
    tables::{
        opening_makes_the_tables_and_can_be_repeated,
        servers_that_start_together_take_turns_to_migrate,
        migrations_go_down_and_up_again,
        a_word_the_tables_do_not_know_is_refused,
        the_database_takes_writes_unless_another_holds_the_write_lock,
        whoever_gets_no_connection_in_time_is_told_that_it_is_busy,
    }
    webhooks::{
        events_are_kept_once,
        events_are_kept_once_when_they_come_at_the_same_time,
        different_events_of_a_room_at_the_same_time_are_all_kept,
        every_order_of_a_story_gives_equal_rows,
        sessions_are_listed_newest_first_and_by_filter,
        pages_of_sessions_neither_repeat_nor_lose_a_row_when_others_come_between,
        nul_and_long_and_emoji_names_survive,
    }
    ledger::{
        every_repetition_is_counted_and_what_came_of_the_first_stays,
        events_of_many_rooms_at_the_same_time_are_each_applied_once_and_in_their_rooms_order,
        an_event_that_cannot_be_applied_is_kept_as_failed_and_takes_no_other_with_it,
        each_step_is_written_once_with_the_event_that_caused_it,
        what_the_application_says_of_rooms_and_people_stands_on_their_rows,
        the_ledger_is_listed_newest_first_by_filter_and_by_page,
        events_before_a_time_are_forgotten_however_many_they_are,
    }
    recordings::{
        admission_finds_the_active_session,
        a_track_continues_its_recording_in_the_same_session_only,
        a_track_continues_its_recording_while_no_session_is_known,
        a_recording_ends_with_its_last_segment,
        a_recording_that_is_asked_for_again_under_its_id_is_the_same,
        the_rows_of_a_connection_that_are_written_twice_are_as_if_once,
        a_session_that_appears_later_gets_the_recordings_of_its_room_and_time,
        a_track_that_webhooks_knew_first_takes_over_what_the_ingest_knows,
        a_recording_that_missed_its_session_finds_it_at_its_end,
        pages_of_recordings_neither_repeat_nor_lose_a_row_when_others_come_between,
    }
    seals::{
        a_seal_comes_with_the_first_ending_and_stays,
        finished_files_have_no_hash_until_they_are_given_one,
        many_interrupted_segments_and_recordings_end_in_one_transaction,
        files_are_found_by_their_paths,
    }
    segments::{
        a_ticket_opens_one_segment_ever,
        the_first_ending_of_a_segment_stays,
        video_is_told_from_audio_by_its_files,
        only_segments_without_an_end_are_open,
        segments_come_in_the_order_of_their_making,
        a_segment_without_its_recording_is_refused_for_good,
    }
    start_queue::{
        of_several_servers_one_claims_a_track,
        an_egress_goes_from_the_queue_to_its_end_and_is_followed_by_one,
        what_ends_takes_its_starts_out_of_the_queue,
        what_is_not_recorded_says_why_and_an_operator_decides_over_rules,
        webhooks_of_an_egress_end_its_own_row_alone,
        a_socket_finds_its_egress_by_ticket_or_by_track,
        the_work_of_a_silent_server_is_taken_over,
        a_row_is_asked_for_by_its_own_server_and_its_first_egress_stays,
        a_track_that_livekit_did_not_know_is_queued_again_for_an_operator_alone,
        an_egress_without_a_row_is_adopted_where_it_has_business,
        a_publisher_who_comes_back_is_followed_by_identity_and_source,
        a_server_closes_what_itself_left_open,
    }
    measurements::{
        measurements_are_listed_with_their_speaker,
        measurements_are_kept_all_or_none,
        pages_of_measurements_are_complete,
    }
    hang_ups::{
        a_call_whose_caller_hangs_up_in_mid_query_is_finished_by_the_store,
        a_call_dropped_at_any_moment_is_finished,
        clients_that_hang_up_in_mid_query_leave_the_server_as_it_was,
        health_checks_that_are_given_up_in_mid_query_leave_the_server_as_it_was,
    }
}
