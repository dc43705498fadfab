//! Rank placement: host, device and cores of each rank, and warnings about oversubscription.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use serde::{Deserialize, Serialize};

use crate::collective::{Collective, CollectiveError, host_name};
use crate::device::Place;

/// Where one rank computes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankPlacement {
    pub host: String,
    /// `cpu`, or `cuda:` and the number of the GPU on its host.
    pub device: String,
    /// PCI address of the GPU.
    pub gpu_address: Option<String>,
    /// The cores near the GPU; empty if the system does not report them.
    pub gpu_cores: BTreeSet<usize>,
    /// The cores in its affinity mask.
    pub cores: BTreeSet<usize>,
    /// The NUMA domains of these cores; empty if the system does not report them.
    pub domains: BTreeSet<usize>,
    pub n_threads: usize,
}

impl RankPlacement {
    /// The placement of this rank.
    fn local(place: &Place) -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let cores = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        let cores = parse_list(cores.unwrap_or_default());
        let domains = (0..)
            .map_while(|node| {
                let list =
                    fs::read_to_string(format!("/sys/devices/system/node/node{node}/cpulist"))
                        .ok()?;
                Some((node, parse_list(&list)))
            })
            .filter(|(_, node_cores)| !node_cores.is_disjoint(&cores))
            .map(|(node, _)| node)
            .collect();
        let gpu_address = place.gpu_address.clone();
        let gpu_cores = gpu_address.as_ref().and_then(|address| {
            fs::read_to_string(format!("/sys/bus/pci/devices/{address}/local_cpulist")).ok()
        });
        Self {
            host: host_name(),
            device: place.device_name(),
            gpu_address,
            gpu_cores: parse_list(&gpu_cores.unwrap_or_default()),
            cores,
            domains,
            n_threads: place.n_threads,
        }
    }
}

/// *All ranks.* Returns the placements of all ranks in rank order.
///
/// # Errors
/// A collective call fails.
pub fn rank_placements(
    place: &Place,
    collective: &dyn Collective,
) -> Result<Vec<RankPlacement>, CollectiveError> {
    let local =
        serde_json::to_vec(&RankPlacement::local(place)).expect("a placement is valid JSON");
    let all = collective.gather_bytes(&local)?;
    let parse = |bytes: &Vec<u8>| {
        serde_json::from_slice(bytes).expect("a rank of this program has written it")
    };
    Ok(all.iter().map(parse).collect())
}

/// A header and one line per rank.
pub fn table(placements: &[RankPlacement]) -> Vec<String> {
    let width = placements
        .iter()
        .map(|placement| placement.host.len())
        .max()
        .unwrap_or(0)
        .max("host".len());
    let header = format!("rank  {:width$}  device   threads  cores", "host");
    let row = |(rank, placement): (usize, &RankPlacement)| {
        let RankPlacement { host, device, cores, domains, n_threads, .. } = placement;
        let domains = if domains.is_empty() {
            String::new()
        } else {
            format!(" (NUMA {})", format_list(domains))
        };
        format!(
            "{rank:4}  {host:width$}  {device:7}  {n_threads:7}  {}{domains}",
            format_list(cores)
        )
    };
    std::iter::once(header).chain(placements.iter().enumerate().map(row)).collect()
}

/// Warnings about ranks that share a GPU or compute far from it, and about more threads than cores.
pub fn warnings(placements: &[RankPlacement]) -> Vec<String> {
    let mut by_gpu: BTreeMap<(&str, &str), Vec<usize>> = BTreeMap::new();
    let mut by_host: BTreeMap<&str, (usize, BTreeSet<usize>)> = BTreeMap::new();
    for (rank, placement) in placements.iter().enumerate() {
        if let Some(address) = &placement.gpu_address {
            by_gpu.entry((&placement.host, address)).or_default().push(rank);
        }
        let (n_threads, cores) = by_host.entry(&placement.host).or_default();
        *n_threads += placement.n_threads;
        cores.extend(&placement.cores);
    }
    let shared =
        by_gpu.iter().filter(|(_, ranks)| ranks.len() > 1).map(|((host, address), ranks)| {
            let ranks: Vec<String> = ranks.iter().map(usize::to_string).collect();
            let ranks = ranks.join(", ");
            format!("ranks {ranks} share the GPU {address} of {host}")
        });
    let far = placements.iter().enumerate().filter_map(|(rank, placement)| {
        let RankPlacement { gpu_address, gpu_cores, cores, .. } = placement;
        let address = gpu_address.as_ref()?;
        (!gpu_cores.is_empty() && gpu_cores.is_disjoint(cores)).then(|| {
            format!(
                "rank {rank} is bound to the cores {}, and its GPU {address} is connected to the \
                 cores {}",
                format_list(cores),
                format_list(gpu_cores)
            )
        })
    });
    let crowded = by_host.iter().filter(|(_, (n_threads, cores))| *n_threads > cores.len()).map(
        |(host, (n_threads, cores))| {
            format!(
                "the ranks on {host} have {n_threads} threads for {} cores: start fewer, or lower \
                 `run.threads_per_rank`",
                cores.len()
            )
        },
    );
    let bound = placements
        .iter()
        .enumerate()
        .filter(|(_, placement)| placement.n_threads > placement.cores.len())
        .map(|(rank, placement)| {
            let (n_threads, n_cores) = (placement.n_threads, placement.cores.len());
            format!("rank {rank} has {n_threads} threads and is bound to {n_cores} cores")
        });
    shared.chain(far).chain(crowded).chain(bound).collect()
}

/// Parses a list in the kernel's format, such as `0-3,8`.
fn parse_list(text: &str) -> BTreeSet<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse::<usize>().ok()?..=last.trim().parse::<usize>().ok()?)
    };
    text.split(',').filter_map(range).flatten().collect()
}

fn format_list(numbers: &BTreeSet<usize>) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => ranges.push((number, number)),
        }
    }
    let range = |&(first, last): &(usize, usize)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    ranges.iter().map(range).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placement(host: &str, device: &str, cores: &str, n_threads: usize) -> RankPlacement {
        RankPlacement {
            host: host.to_owned(),
            device: device.to_owned(),
            gpu_address: device.strip_prefix("cuda:").map(|gpu| format!("0000:0{gpu}:00.0")),
            gpu_cores: BTreeSet::new(),
            cores: parse_list(cores),
            domains: [0].into(),
            n_threads,
        }
    }

    #[test]
    fn lists_have_the_format_of_the_kernel() {
        for text in ["0", "0-3", "0-3,8", "1,3,5-7"] {
            assert_eq!(format_list(&parse_list(&format!("\t{text}\n"))), text);
        }
        assert_eq!(format_list(&parse_list("")), "");
    }

    #[test]
    fn the_table_has_a_line_per_rank() {
        let placements =
            [placement("bow", "cuda:0", "0-7", 8), placement("stern", "cpu", "8-15", 4)];
        assert_eq!(
            table(&placements),
            [
                "rank  host   device   threads  cores",
                "   0  bow    cuda:0         8  0-7 (NUMA 0)",
                "   1  stern  cpu            4  8-15 (NUMA 0)"
            ]
        );
    }

    #[test]
    fn shared_gpus_and_oversubscribed_cores_give_warnings() {
        let good = [
            placement("bow", "cuda:0", "0-7", 4),
            placement("bow", "cuda:1", "0-7", 4),
            placement("stern", "cuda:0", "0", 1),
        ];
        assert_eq!(warnings(&good), [""; 0]);
        let bad = [
            placement("bow", "cuda:0", "0-1", 2),
            placement("stern", "cpu", "0", 2),
            placement("bow", "cuda:0", "0-1", 2),
        ];
        assert_eq!(
            warnings(&bad),
            [
                "ranks 0, 2 share the GPU 0000:00:00.0 of bow",
                "the ranks on bow have 4 threads for 2 cores: start fewer, or lower \
                 `run.threads_per_rank`",
                "the ranks on stern have 2 threads for 1 cores: start fewer, or lower \
                 `run.threads_per_rank`",
                "rank 1 has 2 threads and is bound to 1 cores",
            ]
        );
    }

    #[test]
    fn gpus_are_compared_by_address_and_far_cores_give_a_warning() {
        // Each task of the launcher sees one GPU, whose number is therefore 0.
        let mut tasks =
            [placement("bow", "cuda:0", "0-3", 4), placement("bow", "cuda:0", "4-7", 4)];
        tasks[1].gpu_address = Some("0000:41:00.0".to_owned());
        assert_eq!(warnings(&tasks), [""; 0]);
        tasks[1].gpu_cores = parse_list("8-15");
        assert_eq!(
            warnings(&tasks),
            ["rank 1 is bound to the cores 4-7, and its GPU 0000:41:00.0 is connected to the \
              cores 8-15"]
        );
    }
}
