// Reads our histogram log and writes one, with HdrHistogram for Java: java -cp JAR HdrCheck.java OURS THEIRS
// Prints for each interval: tag, start and length in ms, count, then the values at five percentiles.
import java.io.File;
import java.io.PrintStream;
import java.util.Random;
import org.HdrHistogram.EncodableHistogram;
import org.HdrHistogram.Histogram;
import org.HdrHistogram.HistogramLogReader;
import org.HdrHistogram.HistogramLogWriter;

public class HdrCheck {
    static final double[] PERCENTILES = {0.1, 50, 95, 99.9, 100};

    public static void main(String[] args) throws Exception {
        print(args[0]);
        PrintStream out = new PrintStream(new File(args[1]));
        HistogramLogWriter writer = new HistogramLogWriter(out);
        writer.outputLogFormatVersion();
        writer.outputStartTime(1_763_820_000_123L);
        writer.outputLegend();
        Random random = new Random(1);
        // The second has another layout than ours.
        Histogram[] histograms = {new Histogram(1_000, 3_600_000_000_000L, 3), new Histogram(2)};
        for (int i = 0; i < histograms.length; i++) {
            for (int n = 0; n < 5_000; n++) histograms[i].recordValue((long) Math.exp(17 + random.nextGaussian()));
            histograms[i].setTag("gap.java.L" + i);
            writer.outputIntervalHistogram(i, i + 1, histograms[i]);
        }
        out.close();
        print(args[1]);
    }

    static void print(String path) throws Exception {
        HistogramLogReader reader = new HistogramLogReader(path);
        EncodableHistogram next;
        while ((next = reader.nextIntervalHistogram()) != null) {
            Histogram histogram = (Histogram) next;
            StringBuilder line = new StringBuilder(histogram.getTag());
            line.append('\t').append(histogram.getStartTimeStamp());
            line.append('\t').append(histogram.getEndTimeStamp() - histogram.getStartTimeStamp());
            line.append('\t').append(histogram.getTotalCount());
            for (double percentile : PERCENTILES) line.append('\t').append(histogram.getValueAtPercentile(percentile));
            System.out.println(line);
        }
        reader.close();
    }
}
