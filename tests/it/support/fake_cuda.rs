//! Runs programs on the fake CUDA runtime, and reads its log.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::files::root;
use super::requirements::fake_cuda;

/// A command of the fake CUDA runtime that runs `program`; `None` without the runtime. Emulated
/// kernels run if `has_kernels`.
pub fn on_fake_cuda(program: &Command, has_kernels: bool) -> Option<Command> {
    fake_cuda()?;
    let mut command = Command::new(root().join("tests/fake_cuda/run.sh"));
    command
        .arg(program.get_program())
        .args(program.get_args())
        .envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    if has_kernels {
        command.env("FAKE_CUDA_READS", "memory");
    } else {
        command.env("FAKE_CUDA_KERNELS", "");
    }
    Some(command)
}

/// The log of a rank.
pub fn log_of_rank(log: &Path, rank: Option<usize>) -> PathBuf {
    match rank {
        Some(rank) => PathBuf::from(format!("{}.{rank}", log.display())),
        None => log.to_owned(),
    }
}

/// Counts of one rank's events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Kernels, library calls, copies and memsets that the host queued.
    pub launches: i64,
    pub graph_launches: i64,
    /// Copies from host to device.
    pub copies: i64,
    /// Copies from memory that is not pinned.
    pub pageable_copies: i64,
    /// Waits of the host for the device.
    pub waits: i64,
    pub nccl_calls: i64,
    /// Nodes of the last graph that was captured.
    pub nodes: i64,
    /// NCCL calls in it.
    pub captured_nccl_calls: i64,
    /// Operations of products, and of those over a whole catalogue of `n_items`.
    pub operations: i64,
    pub operations_over_items: i64,
    /// Bytes of copies from the host.
    pub copied_bytes: i64,
    /// By name, for messages.
    pub by_name: BTreeMap<String, i64>,
}

impl Counts {
    /// Reads a log of a model of `n_items` items.
    ///
    /// # Panics
    /// If the runtime has logged a mistake: work that a capture forbids, or NCCL calls that differ
    /// between ranks.
    pub fn read(log: &Path, n_items: usize) -> Self {
        let n_items = n_items.to_string();
        let mut counts = Self::default();
        for line in fs::read_to_string(log).unwrap().lines() {
            let fields: Vec<&str> = line.split('\t').collect();
            let [kind, number, name, how] = fields[..] else { continue };
            match (kind, how) {
                ("forbidden" | "hazard" | "mismatch" | "failed" | "stub", _) => {
                    panic!("{}: {line}", log.display())
                }
                // A replay is the work of the graph that was launched.
                (_, "replayed") => continue,
                ("capture_end", _) => counts.nodes = number.parse().unwrap(),
                ("nccl", "captured") => counts.captured_nccl_calls += 1,
                (_, "captured") => continue,
                ("graph_launch", _) => counts.graph_launches += 1,
                ("wait", _) => counts.waits += 1,
                ("nccl", _) => counts.nccl_calls += 1,
                ("kernel" | "product" | "cudnn" | "memset" | "copy", _) => {
                    counts.launches += 1;
                    let number: i64 = number.parse().unwrap();
                    if kind == "product" {
                        counts.operations += number;
                        let is_over_items = name.split(' ').any(|word| word == n_items);
                        counts.operations_over_items += if is_over_items { number } else { 0 };
                    }
                    let is_copy_in = name.starts_with("H2D");
                    counts.copied_bytes += if is_copy_in { number } else { 0 };
                    counts.copies += i64::from(kind == "copy" && is_copy_in);
                    counts.pageable_copies += i64::from(is_copy_in && name.contains("pageable"));
                }
                _ => continue,
            }
            if how == "eager" {
                *counts.by_name.entry(format!("{kind} {name}")).or_default() += 1;
            }
        }
        counts
    }

    /// What `n_steps` steps more have in each: `self` less `shorter`.
    pub fn per_step(&self, shorter: &Self, n_steps: i64) -> Self {
        let each = |of: fn(&Self) -> i64| {
            let all = of(self) - of(shorter);
            assert_eq!(all % n_steps, 0, "{n_steps} steps differ: {self:#?} {shorter:#?}");
            all / n_steps
        };
        let name = |(name, n): (&String, &i64)| {
            let n = n - shorter.by_name.get(name).copied().unwrap_or_default();
            (n != 0).then(|| (name.clone(), n))
        };
        Self {
            launches: each(|counts| counts.launches),
            graph_launches: each(|counts| counts.graph_launches),
            copies: each(|counts| counts.copies),
            pageable_copies: each(|counts| counts.pageable_copies),
            waits: each(|counts| counts.waits),
            nccl_calls: each(|counts| counts.nccl_calls),
            // Steps differ in their numbers of targets.
            operations: (self.operations - shorter.operations) / n_steps,
            operations_over_items: (self.operations_over_items - shorter.operations_over_items)
                / n_steps,
            copied_bytes: (self.copied_bytes - shorter.copied_bytes) / n_steps,
            nodes: self.nodes,
            captured_nccl_calls: self.captured_nccl_calls,
            by_name: self.by_name.iter().filter_map(name).collect(),
        }
    }
}
