//! The CUDA path on a machine without a GPU: what a step queues, on how many ranks, and what
//! happens when NCCL fails. libtorch's kernels compute nothing there (see tests/fake_cuda).

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;
use tempfile::TempDir;

use crate::support::configs::SHARDED;
use crate::support::fake_cuda::{Counts, log_of_rank, on_fake_cuda};
use crate::support::files::root;
use crate::support::mpirun::mpirun;
use crate::support::process::{Finished, LIMIT, PROGRAM, bireme, run_within};
use crate::support::requirements::fake_cuda;
use crate::support::session_shop::SessionShop;

/// Configurations whose steps have a budget.
const MODELS: [&str; 6] =
    ["gru", "xlnet", "xlnet-side-info", "tuned/gru", "tuned/xlnet", "tuned/best"];

/// Synthetic sessions of two days with all columns of a shop.
struct Shop {
    dir: TempDir,
    /// Rows of its item table.
    n_items: usize,
}

impl Shop {
    fn new() -> Self {
        let mut shop = Self { dir: tempfile::tempdir().unwrap(), n_items: 0 };
        let [events, data] = ["events.csv", "data"].map(|name| shop.path(name));
        let size = ["--events", "90000", "--items", "5000", "--days", "2", "--seed", "5"];
        bireme(&[&["synth", "--out", &events], &size[..]].concat()).success();
        bireme(&["preprocess", "--events", &events, "--out", &data]).success();
        let schema = fs::read_to_string(shop.path("data/schema.pbtxt")).unwrap();
        // The name stands before the lengths of the lists, then before the range of the ids.
        let range = schema.split("product_id-list_seq").nth(2).unwrap();
        let max = range.split("max:").nth(1).unwrap();
        let digits: String = max.trim().chars().take_while(char::is_ascii_digit).collect();
        shop.n_items = digits.parse::<usize>().unwrap() + 1;
        shop
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// Trains `n_steps` steps and evaluates, and returns the counts of rank 0.
    fn train(&self, model: &str, n_ranks: usize, graph: &str, n_steps: usize) -> Option<Counts> {
        let name = format!("{}-{n_ranks}-{graph}-{n_steps}", model.replace('/', "-"));
        let config = root().join(format!("configs/{model}.toml"));
        let mut train = Command::new(PROGRAM);
        train.args(["train", "--config", config.to_str().unwrap(), "--data", &self.path("data")]);
        train.args(["--run-dir", &self.path(&name)]);
        for setting in [
            "run.device=cuda",
            "run.threads_per_rank=1",
            "data.first_day=1",
            "data.last_day=2",
            "train.epochs_per_day=1",
            // The record of the last step is the only one.
            "train.log_every_steps=1000",
            &format!("train.max_steps_per_day={n_steps}"),
            &format!("run.cuda_graph={graph}"),
        ] {
            train.args(["--set", setting]);
        }
        let log = PathBuf::from(self.path(&format!("{name}.log")));
        let mut command = on_fake_cuda(&train, false)?;
        command.env("FAKE_CUDA_LOG", &log).env("FAKE_CUDA_GPUS", n_ranks.to_string());
        if n_ranks == 1 {
            run_within(&mut command, LIMIT).success();
            return Some(Counts::read(&log, self.n_items));
        }
        mpirun(n_ranks, &command, LIMIT)?.success();
        let of_ranks: Vec<Counts> = (0..n_ranks)
            .map(|rank| Counts::read(&log_of_rank(&log, Some(rank)), self.n_items))
            .collect();
        let of_nccl = |counts: &Counts| (counts.nccl_calls, counts.captured_nccl_calls);
        assert!(of_ranks.iter().all(|counts| of_nccl(counts) == of_nccl(&of_ranks[0])), "{name}");
        of_ranks.into_iter().next()
    }

    /// Counts of each step, from runs of five and of nine.
    fn step(&self, model: &str, n_ranks: usize, graph: &str) -> Option<Counts> {
        let [short, long] = [5, 9].map(|n_steps| self.train(model, n_ranks, graph, n_steps));
        Some(long?.per_step(&short?, 4))
    }
}

/// What a step may queue.
#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Budget {
    launches: Each,
    graph_launches: Each,
    copies: Each,
    waits: Each,
    nccl_calls: Each,
    /// Mean over four steps, to four digits.
    operations: Operations,
    /// The same.
    frame_bytes: i64,
}

/// Of library products.
#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Operations {
    fixed: i64,
    /// In products over the whole catalogue, for each item.
    per_item: i64,
}

/// The number with four digits.
fn rounded(number: i64) -> i64 {
    let unit = 10_i64.pow(number.max(1).ilog10().saturating_sub(3));
    number / unit * unit
}

/// Operation by operation, and recorded as a CUDA graph, where launches and NCCL calls are nodes.
#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Each {
    eager: i64,
    captured: i64,
}

impl Budget {
    fn of(eager: &Counts, captured: &Counts, n_items: usize) -> Self {
        let each = |of: fn(&Counts) -> i64| Each { eager: of(eager), captured: of(captured) };
        Self {
            launches: Each { eager: eager.launches, captured: captured.nodes },
            graph_launches: each(|counts| counts.graph_launches),
            copies: each(|counts| counts.copies),
            waits: each(|counts| counts.waits),
            nccl_calls: Each { eager: eager.nccl_calls, captured: captured.captured_nccl_calls },
            operations: Operations {
                fixed: rounded(eager.operations - eager.operations_over_items),
                per_item: rounded(eager.operations_over_items / n_items as i64),
            },
            frame_bytes: rounded(captured.copied_bytes),
        }
    }

    /// Its table in the file.
    fn table(&self, model: &str, n_ranks: usize) -> String {
        let Self {
            launches,
            graph_launches,
            copies,
            waits,
            nccl_calls,
            operations: Operations { fixed, per_item },
            frame_bytes,
        } = self;
        let mut table = format!("[{model}.{n_ranks}]\n");
        for (name, Each { eager, captured }) in [
            ("launches", launches),
            ("graph_launches", graph_launches),
            ("copies", copies),
            ("waits", waits),
            ("nccl_calls", nccl_calls),
        ] {
            writeln!(table, "{name} = {{ eager = {eager}, captured = {captured} }}").unwrap();
        }
        writeln!(table, "operations = {{ fixed = {fixed}, per_item = {per_item} }}").unwrap();
        writeln!(table, "frame_bytes = {frame_bytes}").unwrap();
        table
    }
}

#[test]
fn a_step_queues_what_its_budget_says() {
    if fake_cuda().is_none() {
        return;
    }
    let path = root().join("tests/fake_cuda/budgets.toml");
    let text = fs::read_to_string(&path).unwrap();
    let update = env::var_os("UPDATE_BUDGETS").is_some();
    // What is to be rewritten may lack a key.
    let budgets: BTreeMap<String, BTreeMap<String, Budget>> =
        if update { BTreeMap::new() } else { toml::from_str(&text).unwrap() };
    let shop = Shop::new();
    let (mut measured, mut beside) = (Vec::new(), Vec::new());
    for model in MODELS {
        for n_ranks in [1, 2] {
            let Some(eager) = shop.step(model, n_ranks, "off") else { return };
            let Some(captured) = shop.step(model, n_ranks, "require") else { return };
            assert_eq!((eager.pageable_copies, captured.pageable_copies), (0, 0), "{model}");
            // The copy of the frame is all that the host queues besides the graph.
            assert_eq!(captured.launches, 1, "{model} on {n_ranks}: {:#?}", captured.by_name);
            let (name, budget) =
                (model.replace('/', "-"), Budget::of(&eager, &captured, shop.n_items));
            if budgets.get(&name).and_then(|of_model| of_model.get(&n_ranks.to_string()))
                != Some(&budget)
            {
                beside.push(format!("{model} on {n_ranks}: {:#?}", eager.by_name));
            }
            measured.push(budget.table(&name, n_ranks));
        }
    }
    let comment: String =
        text.lines().take_while(|line| line.starts_with('#')).collect::<Vec<_>>().join("\n");
    let measured = format!("{comment}\n\n{}", measured.join("\n"));
    if update {
        fs::write(&path, measured).unwrap();
        return;
    }
    assert!(
        beside.is_empty(),
        "{}\nmeasured, to be written by `UPDATE_BUDGETS=1` if it is what you want:\n{measured}",
        beside.join("\n")
    );
}

#[test]
fn three_ranks_record_the_same_graph_with_a_replicated_and_a_sharded_table() {
    if fake_cuda().is_none() {
        return;
    }
    let shop = Shop::new();
    for (model, set) in [("gru", "replicated"), ("xlnet", "sharded")] {
        let mut train = Command::new(PROGRAM);
        let config = root().join(format!("configs/{model}.toml"));
        train.args(["train", "--config", config.to_str().unwrap(), "--data", &shop.path("data")]);
        train.args(["--run-dir", &shop.path(model)]);
        let table = format!("parallel.item_table={set}");
        for setting in [
            "run.device=cuda",
            "run.threads_per_rank=1",
            "run.cuda_graph=require",
            "data.first_day=1",
            "data.last_day=2",
            "train.max_steps_per_day=6",
            &table,
        ] {
            train.args(["--set", setting]);
        }
        let log = PathBuf::from(shop.path("log"));
        let mut command = on_fake_cuda(&train, false).unwrap();
        command.env("FAKE_CUDA_LOG", &log).env("FAKE_CUDA_GPUS", "3");
        let Some(finished) = mpirun(3, &command, LIMIT) else { return };
        let stderr = finished.success().stderr;
        assert!(stderr.contains("the steps of the day run as one CUDA graph"), "{stderr}");
        let counts: Vec<Counts> =
            (0..3).map(|rank| Counts::read(&log_of_rank(&log, Some(rank)), 0)).collect();
        assert!(counts.iter().all(|of_rank| of_rank.nodes > 0 && of_rank.graph_launches > 0));
    }
}

/// A GRU on ranks of the fake runtime with `n_gpus` GPUs.
fn train_gru(
    shop: &SessionShop,
    n_ranks: usize,
    n_gpus: usize,
    set: &[&str],
    environment: &[(&str, &str)],
) -> Option<Finished> {
    let on_gpu = ["--set", "run.device=cuda", "--set", "run.threads_per_rank=1"];
    let train = shop.train_command("run", &[&on_gpu[..], &["--overwrite"], set].concat());
    let mut command = on_fake_cuda(&train, false)?;
    command.env("FAKE_CUDA_GPUS", n_gpus.to_string()).envs(environment.iter().copied());
    let limit = Duration::from_secs(90);
    if n_ranks == 1 {
        Some(run_within(&mut command, limit))
    } else {
        mpirun(n_ranks, &command, limit)
    }
}

#[test]
fn runs_that_cannot_be_recorded_say_why_or_are_refused() {
    let shop = SessionShop::new(100);
    for (set, why) in [
        (
            "model.objective={kind=\"replaced\",probability=0.2,weight=1.0}",
            "the objective is `replaced`",
        ),
        ("train.time_phases=true", "`train.time_phases` is set"),
        ("run.cuda_graph=off", "`run.cuda_graph` is `off`"),
    ] {
        let Some(finished) = train_gru(&shop, 1, 1, &["--set", set], &[]) else { return };
        let stderr = finished.success().stderr;
        let line = format!("steps run without a CUDA graph: {why}");
        assert!(stderr.contains(&line), "`{line}` is not in {stderr}");
        if set.starts_with("run.cuda_graph") {
            continue;
        }
        let required = ["--set", set, "--set", "run.cuda_graph=require"];
        let refused = train_gru(&shop, 1, 1, &required, &[]).unwrap();
        assert_eq!(refused.code, Some(1), "{refused:#?}");
        let message = format!("error: `run.cuda_graph` is `require`, but {why}");
        assert!(refused.stderr.contains(&message), "{refused:#?}");
    }
}

#[test]
fn composed_item_vectors_and_tables_that_change_by_row_are_recorded() {
    let shop = SessionShop::new(100);
    let sampled = "train.loss={kind=\"sampled\",n_negatives=16}";
    let sets = [
        &["model.input.content={id_dropout=0.2}", sampled][..],
        &["model.head.cosine=true"],
        &["train.tables={kind=\"adagrad\",learning_rate=0.1,momentum=0.2}"],
        &["train.tables={kind=\"lazy_adamw\"}", "model.input.content={}"],
    ];
    let log = shop.dir.path().join("log");
    for set in sets {
        let set: Vec<&str> = set
            .iter()
            .chain(&["run.cuda_graph=require", "train.log_every_steps=1000"])
            .flat_map(|set| ["--set", set])
            .collect();
        for (n_ranks, parallel) in [(1, &[][..]), (2, &SHARDED)] {
            let set = [&set[..], parallel].concat();
            let environment = [("FAKE_CUDA_LOG", log.to_str().unwrap())];
            let finished = train_gru(&shop, n_ranks, n_ranks, &set, &environment);
            let Some(finished) = finished else { return };
            finished.success();
            let counts = Counts::read(&log_of_rank(&log, (n_ranks > 1).then_some(0)), 0);
            assert!(counts.graph_launches > 0, "{set:?}: {counts:#?}");
        }
    }
}

#[test]
fn each_pass_of_a_reproducible_step_is_one_graph() {
    let shop = SessionShop::new(200);
    let set = ["--set", "run.reduction=reproducible", "--set", "run.cuda_graph=require"];
    let log = shop.dir.path().join("log");
    let environment = [("FAKE_CUDA_LOG", log.to_str().unwrap())];
    for (n_ranks, parallel) in [(1, &[][..]), (2, &SHARDED)] {
        let set = [&set[..], parallel].concat();
        let Some(finished) = train_gru(&shop, n_ranks, n_ranks, &set, &environment) else { return };
        finished.success();
        let rank = (n_ranks > 1).then_some(0);
        let counts = Counts::read(&log_of_rank(&log, rank), 0);
        // Twenty steps of six micro-batches, less the first of each day.
        let n_passes = 20 * 6 / n_ranks as i64;
        assert!((n_passes - 10..n_passes).contains(&counts.graph_launches), "{counts:#?}");
    }
}

#[test]
fn ranks_that_share_a_gpu_are_refused_and_those_with_one_each_are_not() {
    let shop = SessionShop::new(60);
    let Some(shared) = train_gru(&shop, 2, 1, &[], &[]) else { return };
    shared.refused("ranks 0, 1 share the GPU");
    assert!(shared.stderr.contains("hint: start at most one rank for each GPU"), "{shared:#?}");
    // As launchers do that give a task one GPU: each rank sees one, which it numbers 0.
    let on_gpu = ["--set", "run.device=cuda", "--overwrite"];
    let mut shell = Command::new("/bin/sh");
    let train = on_fake_cuda(&shop.train_command("run", &on_gpu), false).unwrap();
    shell
        .args(["-c", r#"CUDA_VISIBLE_DEVICES=$OMPI_COMM_WORLD_RANK exec "$0" "$@""#])
        .arg(train.get_program())
        .args(train.get_args())
        .envs(train.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .env("FAKE_CUDA_GPUS", "2");
    let finished = mpirun(2, &shell, LIMIT).unwrap().success();
    assert!(!finished.stderr.contains("share"), "{finished:#?}");
}

#[test]
fn old_drivers_and_libraries_are_named() {
    let shop = SessionShop::new(60);
    let old_driver = [("FAKE_CUDA_DRIVER_VERSION", "12040")];
    let Some(refused) = train_gru(&shop, 1, 1, &[], &old_driver) else { return };
    refused.refused("its driver supports CUDA 12.4, and libtorch needs CUDA 13.0");
    let old_nccl = [("FAKE_NCCL_VERSION", "20803")];
    let refused = train_gru(&shop, 2, 2, &[], &old_nccl).unwrap();
    refused.refused("NCCL 2.8.3 is too old: 2.9.6 or newer is needed");
    let mut doctor = Command::new(PROGRAM);
    doctor.args(["doctor", "--device", "cuda", "--dir", shop.dir.path().to_str().unwrap()]);
    let doctor = run_within(&mut on_fake_cuda(&doctor, false).unwrap(), LIMIT).success().stdout;
    assert!(doctor.contains("for CUDA 13.0") && doctor.contains("2.28.9"), "{doctor}");
}

#[test]
fn a_rank_that_nccl_waits_for_ends_the_job_with_a_message() {
    let shop = SessionShop::new(60);
    let patience = ["--set", "run.patience_seconds=1"];
    for (fault, what) in [("init-never:1", "ncclCommInitRank"), ("call-never:1:5", "all_")] {
        let faults = [("FAKE_NCCL_FAULT", fault)];
        let Some(finished) = train_gru(&shop, 2, 2, &patience, &faults) else { return };
        assert_eq!(finished.code, Some(1), "{finished:#?}");
        assert!(finished.stderr.contains(what), "{finished:#?}");
        assert!(finished.took < Duration::from_secs(60), "{:?}", finished.took);
    }
}

/// This test program on the fake runtime, with the tests whose names contain `filter`.
fn tests_on_fake_cuda(filter: &str, n_gpus: usize) -> Option<Command> {
    let mut tests = Command::new(env::current_exe().unwrap());
    tests.args([filter, "--nocapture", "--test-threads=1"]);
    let mut command = on_fake_cuda(&tests, true)?;
    command.env("FAKE_CUDA_GPUS", n_gpus.to_string());
    Some(command)
}

#[test]
fn kernels_on_the_fake_runtime_compute_what_the_cpu_computes() {
    let Some(mut tests) = tests_on_fake_cuda("cuda_kernels::", 1) else { return };
    let finished = run_within(&mut tests, LIMIT).success();
    assert!(!finished.stdout.contains("skipped"), "{finished:#?}");
    assert!(finished.stdout.contains("3 passed"), "{finished:#?}");
}

#[test]
fn kernels_are_right_under_sanitizers_and_in_any_order_of_threads() {
    if fake_cuda().is_none() {
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let mut emulate = Command::new("python3");
    emulate
        .args(["-B", "tests/fake_cuda/emulate.py", "src/kernels/cuda"])
        .arg(out.path())
        .arg("--test")
        .current_dir(root());
    let finished = run_within(&mut emulate, LIMIT).success();
    assert!(finished.stdout.contains("all checks passed"), "{finished:#?}");
}

#[test]
fn kernels_compile_for_gpus_without_spilling_registers() {
    let Some(fake) = fake_cuda() else { return };
    let mut check = Command::new("python3");
    check
        .args(["-B", "tests/fake_cuda/nvrtc_check.py"])
        .args([fake.join("nvrtc/nvidia/cu13/lib"), root().join("src/kernels/cuda")])
        .current_dir(root());
    run_within(&mut check, LIMIT).success();
}
