//! What the vectors of items begin as: factors of co-occurrence counts, or vectors from a file.

use tch::{Device, Kind, Tensor};

use super::evidence::Counts;
use crate::data::{Pretrained, with_seed};

/// Columns beyond the wanted ones, which make the factors of a random projection accurate.
const OVERSAMPLING: i64 = 16;

/// Multiplications by the matrix between two orthogonalisations.
const N_ITERATIONS: usize = 3;

/// Factors `F: [V, width]` of the symmetric matrix `M` of pair weights, `w_ij / (n_i n_j)^¼`, such
/// that `F Fᵀ` is near `M`: a randomised eigendecomposition (Halko et al. 2011). Negative
/// eigenvalues count as 0. The same on every rank: sums have one order.
pub(super) fn factors_of_pairs(counts: &Counts, width: i64, seed: u64) -> Tensor {
    let damping: Vec<f32> = counts.items.iter().map(|&n| (n.max(1) as f32).powf(-0.25)).collect();
    let pairs: Vec<(usize, usize, f32)> =
        counts.weights().map(|(i, j, weight)| (i, j, weight * damping[i] * damping[j])).collect();
    let n_items = counts.items.len() as i64;
    let n_columns = (width + OVERSAMPLING).min(n_items);
    let basis = |y: &Tensor| Tensor::linalg_qr(y, "reduced").0;
    let mut y = with_seed(seed, || Tensor::randn([n_items, n_columns], (Kind::Float, Device::Cpu)));
    for _ in 0..N_ITERATIONS {
        y = multiply(&pairs, &basis(&y));
    }
    let q = basis(&y);
    let within = q.tr().matmul(&multiply(&pairs, &q));
    let (eigenvalues, vectors) = ((&within + within.tr()) / 2.0).linalg_eigh("L");
    // In ascending order.
    let n_kept = width.min(n_columns);
    let roots = eigenvalues.narrow(0, n_columns - n_kept, n_kept).clamp_min(0.0).sqrt();
    let factors = q.matmul(&vectors.narrow(1, n_columns - n_kept, n_kept)) * roots;
    factors.constant_pad_nd([0, width - n_kept])
}

/// `M x` for the symmetric matrix of `pairs` and `x: [V, k]`.
fn multiply(pairs: &[(usize, usize, f32)], x: &Tensor) -> Tensor {
    let (n, k) = x.size2().expect("the factor is [V, k]");
    let values = Vec::<f32>::try_from(x.contiguous().view([-1])).expect("x is f32 on the host");
    let (k, mut product) = (k as usize, vec![0.0_f32; values.len()]);
    let mut add = |to: usize, from: usize, weight: f32| {
        let sums = &mut product[to * k..(to + 1) * k];
        let terms = &values[from * k..(from + 1) * k];
        sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += weight * term);
    };
    for &(first, second, weight) in pairs {
        add(first, second, weight);
        if first != second {
            add(second, first, weight);
        }
    }
    Tensor::from_slice(&product).view([n, k as i64])
}

/// Vectors `[n, width]` of the items of a file: projected on their principal axes if they are
/// wider, padded with zeros if they are narrower.
pub(super) fn pretrained_vectors(pretrained: &Pretrained, width: i64) -> Tensor {
    let n_columns = pretrained.width as i64;
    let vectors = Tensor::from_slice(&pretrained.values).view([-1, n_columns]);
    if n_columns <= width {
        return vectors.constant_pad_nd([0, width - n_columns]);
    }
    let products = vectors.tr().matmul(&vectors).to_kind(Kind::Double);
    let (_, axes) = products.linalg_eigh("L");
    vectors.matmul(&axes.narrow(1, n_columns - width, width).to_kind(Kind::Float))
}

/// `x` with the root mean square `std` over its rows that are not zero.
pub(super) fn scaled(x: &Tensor, std: f64) -> Tensor {
    let squares = x.square().sum(Kind::Double).double_value(&[]);
    let is_row = x.abs().amax([1i64].as_slice(), false).gt(0.0);
    let n_rows = is_row.sum(Kind::Int64).int64_value(&[]).max(1);
    let mean = squares / (n_rows * x.size()[1]) as f64;
    if mean > 0.0 { x * (std / mean.sqrt()) } else { x.shallow_clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts of sessions within groups of items, with eigenvalues far apart.
    fn counts() -> Counts {
        let mut counts = Counts::of_items(30);
        counts.begin_day(1);
        let mut state = 1_u64;
        let mut below = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) % n) as i64
        };
        for (group, n_sessions) in [(0, 640), (1, 160), (2, 40)] {
            for _ in 0..n_sessions {
                let items = [0; 3].map(|_| 2 + group * 9 + below(9));
                counts.add_items(&items, true);
            }
        }
        counts.end_day();
        counts
    }

    #[test]
    fn factors_give_the_matrix_of_pair_weights() {
        let counts = counts();
        let damping = |i: usize| (counts.items[i].max(1) as f32).powf(-0.25);
        let dense = Tensor::zeros([30, 30], (Kind::Float, Device::Cpu));
        for (i, j, weight) in counts.weights() {
            let weight = weight * damping(i) * damping(j);
            let _ = dense.get(i as i64).get(j as i64).g_add_scalar_(f64::from(weight));
            if i != j {
                let _ = dense.get(j as i64).get(i as i64).g_add_scalar_(f64::from(weight));
            }
        }
        let (eigenvalues, vectors) = dense.linalg_eigh("L");
        for width in [1, 3] {
            let kept = |x: &Tensor, dim| x.narrow(dim, 30 - width, width);
            let (values, vectors) = (kept(&eigenvalues, 0).clamp_min(0.0), kept(&vectors, 1));
            let best = (&vectors * values).matmul(&vectors.tr());
            let factors = factors_of_pairs(&counts, width, 5);
            let difference = (factors.matmul(&factors.tr()) - &best).abs().max();
            let largest = best.abs().max().double_value(&[]);
            assert!(difference.double_value(&[]) < 1e-3 * largest, "{difference:?} {largest}");
        }
        assert_eq!(factors_of_pairs(&counts, 64, 5).size(), [30, 64]);
    }

    #[test]
    fn wide_vectors_keep_their_products_as_far_as_the_width_allows() {
        let narrow = Tensor::randn([20, 3], (Kind::Float, Device::Cpu));
        let wide = narrow.matmul(&Tensor::randn([3, 8], (Kind::Float, Device::Cpu)));
        let values = Vec::<f32>::try_from(wide.view([-1])).unwrap();
        let pretrained = Pretrained { items: (2..22).collect(), width: 8, values };
        let expected = wide.matmul(&wide.tr());
        for width in [3, 5, 8, 10] {
            let vectors = pretrained_vectors(&pretrained, width);
            assert_eq!(vectors.size(), [20, width]);
            let difference = (vectors.matmul(&vectors.tr()) - &expected).abs().max();
            assert!(difference.double_value(&[]) < 1e-2, "{width} {difference:?}");
        }
        let scaled = scaled(&pretrained_vectors(&pretrained, 5), 0.1);
        let mean = scaled.square().mean(Kind::Double).double_value(&[]);
        assert!((mean.sqrt() - 0.1).abs() < 1e-4);
    }
}
