//! The counter-based generator of dropout masks: numbers of rows and columns, as in
//! `cuda/dropout.cu`.
//!
//! An element is kept if the wrapping product of its row number and its column number, a signed
//! 32-bit integer, is not below a threshold. A product takes one instruction per element, and a
//! loop over elements is vectorised. Both numbers are odd, so that for a fixed row the product is a
//! bijection of the column numbers, and the high bits, which decide, depend on all bits of both.

/// The integer hash lowbias32 (C. Wellons 2018, "Prospecting for Hash Functions"): a bijection in
/// which each input bit flips each output bit with a probability close to ½.
pub fn mix(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x7FEB_352D);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846C_A68B);
    x ^ (x >> 16)
}

/// The number of the row with the key `key` where dropout is applied for the `site`-th time. Odd.
pub fn row_number(key: i32, site: u32) -> i32 {
    // Multiples of 2³² divided by the golden ratio spread the sites over all keys.
    let counter = key.cast_unsigned().wrapping_add(site.wrapping_mul(0x9E37_79B9));
    (mix(counter) | 1).cast_signed()
}

/// The number of a column. Odd.
pub fn column_number(column: u32) -> i32 {
    // The constant is the fraction of √2. It separates columns from rows with small keys.
    (mix(column.wrapping_add(0x6A09_E667)) | 1).cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: f64 = 0.3;

    /// What a mask drops, scaled to mean 0 and variance 1: `[row_numbers, n_columns]`.
    struct Dropped {
        rows: Vec<Vec<f64>>,
    }

    impl Dropped {
        fn new(row_numbers: &[i32], n_columns: u32) -> Self {
            let threshold = ((P - 0.5) * 2f64.powi(32)) as i32;
            let columns: Vec<i32> = (0..n_columns).map(column_number).collect();
            let scaled = |row: i32, column: i32| {
                let is_dropped = f64::from(u8::from(row.wrapping_mul(column) < threshold));
                (is_dropped - P) / (P * (1.0 - P)).sqrt()
            };
            let row = |&row: &i32| columns.iter().map(|&column| scaled(row, column)).collect();
            Self { rows: row_numbers.iter().map(row).collect() }
        }

        /// Mean over all elements that have neighbours at these distances of the product of an
        /// element and its neighbours.
        fn mean_product(&self, neighbours: &[(usize, usize)]) -> f64 {
            let last =
                |of: fn(&(usize, usize)) -> usize| neighbours.iter().map(of).max().unwrap_or(0);
            let n_rows = self.rows.len() - last(|place| place.0);
            let n_columns = self.rows[0].len() - last(|place| place.1);
            let product = |row: usize, column: usize| {
                let x = |place: &(usize, usize)| self.rows[row + place.0][column + place.1];
                neighbours.iter().fold(self.rows[row][column], |product, place| product * x(place))
            };
            let sum: f64 =
                (0..n_rows).map(|i| (0..n_columns).map(|j| product(i, j)).sum::<f64>()).sum();
            sum / (n_rows * n_columns) as f64
        }

        /// Variance of the means of rows, times the number of columns: 1 for independent elements.
        fn variance_of_row_means(&self) -> f64 {
            let n = self.rows[0].len() as f64;
            let squares = self.rows.iter().map(|row| row.iter().sum::<f64>().powi(2) / n);
            squares.sum::<f64>() / self.rows.len() as f64
        }

        fn transposed(&self) -> Self {
            let column = |j: usize| self.rows.iter().map(|row| row[j]).collect();
            Self { rows: (0..self.rows[0].len()).map(column).collect() }
        }
    }

    /// Keys that count up from 0, and keys that have no pattern.
    fn keys(n: u32) -> [Vec<i32>; 2] {
        let key = |i: u32| mix(mix(i).wrapping_add(7)).cast_signed();
        [(0..n.cast_signed()).collect(), (0..n).map(key).collect()]
    }

    #[test]
    fn numbers_are_those_of_the_kernel() {
        assert_eq!([mix(0), mix(1), mix(0xFFFF_FFFF)], [0, 0x6889_90C0, 0x6768_824A]);
        assert_eq!([row_number(-1, 5), column_number(3)], [2_082_786_835, 247_117_289]);
    }

    #[test]
    fn masks_drop_the_requested_part_and_elements_are_independent() {
        let (n, d) = (2000, 768);
        for keys in keys(n) {
            let numbers: Vec<i32> = keys.iter().map(|&key| row_number(key, 3)).collect();
            let dropped = Dropped::new(&numbers, d);
            // The standard error of a mean of products is 1 / √(n d) = 8e-4.
            let bound = 4.5e-3;
            let mean = dropped.mean_product(&[]);
            assert!(mean.abs() < bound, "mean {mean}");
            for neighbour in [(0, 1), (1, 0), (1, 1), (0, 3), (3, 0), (0, 64), (64, 0)] {
                let correlation = dropped.mean_product(&[neighbour]);
                assert!(correlation.abs() < bound, "{neighbour:?}: {correlation}");
            }
            // The four corners of a rectangle share two row and two column numbers.
            for (rows, columns) in [(1, 1), (1, 2), (2, 1), (5, 32)] {
                let corners = [(0, columns), (rows, 0), (rows, columns)];
                let product = dropped.mean_product(&corners);
                assert!(product.abs() < bound, "{rows} x {columns}: {product}");
            }
            for variance in
                [dropped.variance_of_row_means(), dropped.transposed().variance_of_row_means()]
            {
                assert!((variance - 1.0).abs() < 0.2, "{variance}");
            }
        }
    }

    #[test]
    fn masks_of_two_sites_are_independent() {
        for keys in keys(2000) {
            // Rows of the two sites alternate.
            let both = |&key: &i32| [row_number(key, 1), row_number(key, 2)];
            let numbers: Vec<i32> = keys.iter().flat_map(both).collect();
            let correlation = Dropped::new(&numbers, 256).mean_product(&[(1, 0)]);
            assert!(correlation.abs() < 5e-3, "{correlation}");
        }
    }

    #[test]
    fn the_hash_flips_each_output_bit_half_of_the_time() {
        let n = 4000;
        for input_bit in 0..32 {
            let flipped = (0..n).map(|x: u32| {
                let x = x.wrapping_mul(0x9E37_79B9);
                mix(x) ^ mix(x ^ 1 << input_bit)
            });
            let mut counts = [0u32; 32];
            for bits in flipped {
                (0..32).for_each(|bit| counts[bit] += bits >> bit & 1);
            }
            for count in counts {
                let part = f64::from(count) / f64::from(n);
                assert!((part - 0.5).abs() < 0.045, "input bit {input_bit}: {part}");
            }
        }
    }
}
